"""Codes of a whole dataset, made once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdis.data import FactorDataset
from fastdis.data.progress import progress_bar

Encoder = Callable[[Tensor], Tensor]


def encode(
    encode: Encoder,
    dataset: FactorDataset,
    *,
    batch_size: int = 128,
    device: str | torch.device | None = None,
    autocast: torch.dtype | None = None,
    progress: bool = False,
    distributed: bool = True,
) -> Tensor:
    """Encode every image of a dataset once.

    Parameters
    ----------
    encode : callable
        Takes images, float32 [b, C, H, W], and returns their codes, [b, d]: a module, or any function. A module (also
        that of a bound method) is in evaluation mode meanwhile, and every part of it is afterwards in the mode it was
        in. A module that a function merely uses is left as it is.
    dataset : FactorDataset
        n images.
    batch_size : int, optional
        How many images are encoded at once; the next ones are fetched meanwhile. More pay on a GPU. On a CPU they may
        take twice as long: activations above 32 MB, such as 256 times 32 channels of 32 x 32, get fresh memory from the
        system every time.
    device : str or torch.device, optional
        Where the images go. By default where the module's parameters are, or else the CPU. The module is not moved.
    autocast : torch.dtype, optional
        ``torch.bfloat16`` or ``torch.float16``: encode in mixed precision. Codes then carry that precision's rounding
        error, two to three significant digits. By default nothing is rounded.
    progress : bool, optional
        Show a progress bar on stderr.
    distributed : bool, optional
        Where ``torch.distributed`` is initialised, every process calls this, encodes its contiguous share of the
        images, and gets the codes of all. ``False`` encodes all images in this process alone, for when only one
        process evaluates.

    Returns
    -------
    Tensor of float32, [n, d]
        Codes in the dataset's order, on the CPU.

    Raises
    ------
    TypeError
        ``encode`` cannot be called, or returns something else than a tensor of real numbers.
    ValueError
        ``batch_size < 1``; or the codes do not have shape [b, d], or are NaN or infinite, which names the first image
        of which they are.
    RuntimeError
        Another process failed.

    Notes
    -----
    Nothing is differentiated. Metrics that the literature evaluates by encoding images as they are sampled, the
    FactorVAE score a million times, become gathers on this table: the same for an encoder that gives an image the same
    code each time. Datasets that draw noise or a background anew in every batch are encoded with one draw an image.

    Examples
    --------
    >>> import numpy as np
    >>> from fastdis.data import FactorDataset
    >>> dataset = FactorDataset(np.zeros((6, 8, 8), np.uint8), (2, 3))
    >>> encode(lambda images: images.mean(dim=(2, 3)), dataset).shape
    torch.Size([6, 1])
    """
    if not callable(encode):
        raise TypeError(f"encode must be a function of images, got {type(encode).__name__}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not (autocast is None or isinstance(autocast, torch.dtype)):
        raise TypeError(f"autocast must be a dtype such as torch.bfloat16, got {autocast!r}")
    module = _module_of(encode)
    where = _device_of(module) if device is None else torch.device(device)
    sharded = distributed and dist.is_available() and dist.is_initialized()
    rank, processes = (dist.get_rank(), dist.get_world_size()) if sharded else (0, 1)

    def encode_share() -> Tensor:
        share = torch.arange(len(dataset)).tensor_split(processes)[rank]
        # One bar of one process: the shares are equal, and bars of several would overwrite each other.
        with (
            torch.no_grad(),
            _evaluating(module),
            contextlib.nullcontext() if autocast is None else torch.autocast(where.type, autocast),
            progress_bar("encoding") if progress and rank == 0 else contextlib.nullcontext() as update,
        ):
            return _encode_rows(encode, dataset, share, batch_size, where, update)

    return _gather(encode_share, len(dataset), rank, processes) if sharded else encode_share()


def _encode_rows(
    encode: Encoder,
    dataset: FactorDataset,
    rows: Tensor,
    batch_size: int,
    device: torch.device,
    update: Callable[..., None] | None,
) -> Tensor:
    """Return the codes [len(rows), d] of the images ``rows``, which follow one another."""
    table = torch.empty(0, 0)
    done = 0
    for images in _fetched(dataset, rows.split(batch_size) if len(rows) else ()):
        codes = _checked(encode(images.to(device, non_blocking=True)), len(images))
        if done == 0:
            table = torch.empty(len(rows), codes.shape[1])
        if codes.shape[1] != table.shape[1]:
            raise ValueError(f"encode must always return as many codes, got {table.shape[1]} and {codes.shape[1]}")
        written = table[done : done + len(codes)].copy_(codes)
        finite = written.isfinite().all(dim=1)
        if not finite.all():
            image = int(rows[done + int(finite.logical_not().nonzero()[0])])
            raise ValueError(f"encode must return finite codes, and those of image {image} hold NaN or infinity")
        done += len(codes)
        if update is not None:
            update(done, len(rows))
    return table


def _fetched(dataset: FactorDataset, batches: tuple[Tensor, ...]) -> Iterator[Tensor]:
    """Yield the images of each batch; one thread fetches the next ones while these are worked on."""
    with ThreadPoolExecutor(max_workers=1) as fetcher:
        ahead = [fetcher.submit(dataset.batch, rows) for rows in batches[:1]]
        for rows in batches[1:]:
            images = ahead.pop().result()
            ahead.append(fetcher.submit(dataset.batch, rows))
            yield images
        for last in ahead:
            yield last.result()


def _checked(codes: object, images: int) -> Tensor:
    """Return what an encoder returned, if it is codes."""
    if not isinstance(codes, Tensor):
        found = f"a {type(codes).__name__} of {len(codes)}" if isinstance(codes, tuple | list) else type(codes).__name__
        raise TypeError(
            f"encode must return one tensor of codes, got {found}; of a model that returns more, pass a function that "
            "picks, such as lambda images: model.encode(images)[0]"
        )
    if codes.is_complex():
        raise TypeError(f"encode must return real codes, got {codes.dtype}")
    if codes.dim() != 2 or len(codes) != images or codes.shape[1] == 0:
        raise ValueError(f"encode must return codes [{images}, d] of {images} images, got {list(codes.shape)}")
    return codes


def _gather(encode_share: Callable[[], Tensor], n: int, rank: int, processes: int) -> Tensor:
    """Encode this process's share, and return the codes of all."""
    share, failure = torch.empty(0, 0), None
    try:
        share = encode_share()
    except BaseException as error:
        failure = error
    # A process that failed must still say so, or the others would wait for its codes for ever.
    states: list[tuple[int, str | None]] = [(0, None)] * processes
    dist.all_gather_object(states, (share.shape[1], None if failure is None else str(failure) or repr(failure)))
    if failure is not None:
        raise failure
    for other, (_, message) in enumerate(states):
        if message is not None:
            raise RuntimeError(f"process {other} could not encode its share: {message}")
    # Where there are more processes than images, some encoded none, and do not know how many codes an image has.
    d = max(width for width, _ in states)
    if any(width not in (0, d) for width, _ in states):
        raise ValueError(f"encode must always return as many codes, got {sorted({w for w, _ in states if w})}")
    longest = -(-n // processes)
    # NCCL knows no memory but a GPU's.
    where = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    padded = torch.zeros(longest, d, device=where)
    padded[: len(share)] = share.reshape(len(share), d)
    tables = [torch.empty_like(padded) for _ in range(processes)]
    dist.all_gather(tables, padded)
    lengths = [len(rows) for rows in torch.arange(n).tensor_split(processes)]
    return torch.cat([table[:length] for table, length in zip(tables, lengths, strict=True)]).cpu()


def _module_of(encode: Encoder) -> nn.Module | None:
    """Return the module that ``encode`` is, or is a method of."""
    owner = encode if isinstance(encode, nn.Module) else getattr(encode, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def _device_of(module: nn.Module | None) -> torch.device:
    tensor = None if module is None else next((t for ts in (module.parameters(), module.buffers()) for t in ts), None)
    return torch.device("cpu") if tensor is None else tensor.device


@contextlib.contextmanager
def _evaluating(module: nn.Module | None) -> Iterator[None]:
    """Put a module in evaluation mode, and every part of it back into the mode it was in."""
    # One by one: parts may be in different modes, such as normalisation that is frozen while the rest trains.
    modes = [] if module is None else [(part, part.training) for part in module.modules()]
    try:
        if module is not None:
            module.eval()
        yield
    finally:
        for part, training in modes:
            part.training = training
