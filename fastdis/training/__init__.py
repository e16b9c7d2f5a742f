"""The training loop, its checkpoints, and what a trained model makes of a dataset."""

from fastdis.training.checkpoint import Checkpoint, load_checkpoint
from fastdis.training.encoding import encode_dataset
from fastdis.training.trainer import Trainer, TrainingDivergedError

__all__ = ["Checkpoint", "Trainer", "TrainingDivergedError", "encode_dataset", "load_checkpoint"]
