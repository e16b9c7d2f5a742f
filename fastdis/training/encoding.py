"""Codes of a whole dataset."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdis.data import FactorDataset
from fastdis.models import VAE


@torch.no_grad()
def encode_dataset(model: VAE, dataset: FactorDataset, batch_size: int = 256) -> Tensor:
    """Encode every image once.

    Parameters
    ----------
    model : VAE
        Its posterior means are the codes. It is put into evaluation mode meanwhile, and stays on its device.
    dataset : FactorDataset
        n images.
    batch_size : int, optional
        How many images are encoded at once.

    Returns
    -------
    Tensor, [n, d]
        Codes, in the dataset's order, on the CPU.

    Raises
    ------
    ValueError
        ``batch_size < 1``, or the images do not fit the model.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        codes = [
            model.encode(dataset.batch(rows).to(device))[0].cpu()
            for rows in torch.arange(len(dataset)).split(batch_size)
        ]
    finally:
        model.train(was_training)
    return torch.cat(codes)
