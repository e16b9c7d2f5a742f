"""The training loop and its checkpoints."""

from fastdis.training.checkpoint import Checkpoint, load_checkpoint
from fastdis.training.trainer import Trainer, TrainingDivergedError

__all__ = ["Checkpoint", "Trainer", "TrainingDivergedError", "load_checkpoint"]
