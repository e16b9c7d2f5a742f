"""A decoder's output and its Jacobian for all latents at once, by one matrix product or convolution a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdis.ops import _backends, _checks, _jets, _perceptron
from fastdis.ops.isometry_penalty import isometry_penalty
from fastdis.reference.isometry_penalty import KINDS, penalty_of_gram

OPERATIONS_PER_ELEMENT = 16.0  # that a machine does while it moves one element to or from memory


def decoder_jacobian(decoder: Callable[[Tensor], Tensor], z: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    r"""Decode latents, and differentiate each sample by its latents, exactly and in one forward pass.

    .. math:: x_b = f(z_b), \qquad J_{bk} = \partial f(z_b) / \partial z_{bk}

    Forward mode for all K latents at once: every layer maps the primal and its K tangents in one matrix product or
    convolution, activations are fused with biases and with their derivatives, and before the first activation the K
    tangents, which all samples share there, are mapped once for the whole batch. Linear layers and the activations
    between them are one step of autograd. The result is differentiated in reverse mode at the cost of an ordinary
    backward pass over (1 + K) B rows, with no double backward: so a penalty of the Jacobian, as in IRVAE (Lee et al.,
    2022) and FMVAE (Chen et al., 2020), trains the decoder.

    Parameters
    ----------
    decoder : callable
        A module or any function of a tensor [B, K] that treats the samples of a batch independently. Its own Python
        code is run, with an object in the place of ``z`` that implements ``__torch_function__``; ``isinstance(z,
        Tensor)`` does not hold for it. Linear and convolution layers, activations, reshapes, upsampling, pooling,
        padding, concatenation, arithmetic, GroupNorm, LayerNorm, InstanceNorm, and BatchNorm in evaluation mode (folded
        into the layer before it) are handled; any other function is differentiated by ``torch.func``, more slowly,
        which a warning says once for each. Dropout in training mode uses one mask for a sample and its tangents.
    z : Tensor [B, K]
        float32, float64, float16 or bfloat16; B may be 0, K may not.
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        Of the activations. A backend asked for by name fails rather than give way to another.

    Returns
    -------
    x : Tensor [B, *]
        ``decoder(z)``.
    jacobian : Tensor [B, K, *]
        In the dtype of ``x``, as a transposed view of [K, B, *], images channels-last on a CPU; expanded over the batch
        where the decoder is affine.
        Both are differentiable in ``z`` and in everything that the decoder uses.

    Raises
    ------
    TypeError
        If ``z`` is not a tensor of a floating dtype, the decoder is not callable or does not return one tensor, or it
        calls a method in place (``inplace=True`` of activation modules is right).
    ValueError
        If ``z`` is not [B, K] with K >= 1, the decoder's output does not have the batch size of ``z``, or the decoder
        normalises over the batch, as BatchNorm does in training mode: then no Jacobian of one sample exists.
    RuntimeError
        If the backend asked for cannot serve here.

    Examples
    --------
    >>> decoder = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Linear(64, 784))
    >>> x, jacobian = decoder_jacobian(decoder, torch.randn(100, 2))
    >>> jacobian.shape
    torch.Size([100, 2, 784])
    """
    x, tangents = _decode(decoder, z, backend).pair()
    _check_output(x, z)
    return x.contiguous(), tangents.transpose(0, 1)


def decoder_isometry_penalty(
    decoder: Callable[[Tensor], Tensor],
    z: Tensor,
    kind: str = "isometry",
    *,
    fold: bool | str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Decode latents, and penalise the pull-back metric :math:`J J^\top` of the decoder's Jacobian.

    The same as :func:`decoder_jacobian` followed by :func:`isometry_penalty`. Where the decoder ends in a linear layer
    of weight W without an activation, :math:`J J^\top = T (W^\top W) T^\top` with T the tangents before that layer, and
    the Jacobian itself need not be formed.

    Parameters
    ----------
    decoder : callable
    z : Tensor [B, K]
        As in :func:`decoder_jacobian`.
    kind : {"isometry", "scaled_isometry", "conformal", "relaxed_distortion", "orthogonality"}
        As in :func:`isometry_penalty`; ``"relaxed_distortion"`` is IRVAE's (Lee et al., 2022), ``"scaled_isometry"``
        FMVAE's (Chen et al., 2020).
    fold : "auto" or bool
        Whether to use the last layer's W^T W. ``"auto"`` counts operations and memory traffic of both ways.
    backend : {"auto", "reference", "cpu", "cuda", "triton"}
        Of the activations and of the penalty.

    Returns
    -------
    x : Tensor [B, *]
        ``decoder(z)``.
    penalty : Tensor []
        In float32, or float64 for float64 outputs; NaN for an empty batch.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As :func:`decoder_jacobian`; also if ``kind`` or ``fold`` is unknown, or ``fold`` is True and the decoder does
        not end in a linear layer on [B, H].

    Examples
    --------
    >>> decoder = torch.nn.Sequential(torch.nn.Linear(8, 256), torch.nn.ReLU(), torch.nn.Linear(256, 784))
    >>> x, penalty = decoder_isometry_penalty(decoder, torch.randn(100, 8), "relaxed_distortion")
    """
    _checks.one_of("kind", kind, KINDS)
    if not isinstance(fold, bool) and fold != "auto":
        raise ValueError(f"fold is {fold!r}; allowed are 'auto', True and False")
    jet = _decode(decoder, z, backend)
    last = jet.last_linear()
    if fold is True and last is None:
        raise ValueError("fold is True, but the decoder does not end in a linear layer on [B, H]; 'auto' is needed")
    if last is not None and (_folding_pays(last, *z.shape) if fold == "auto" else fold):
        return _folded_penalty(last, z, kind)
    x, tangents = jet.pair()
    _check_output(x, z)
    return x.contiguous(), isometry_penalty(tangents.transpose(0, 1), kind, backend=backend)


def _folding_pays(last: _jets.Layer, batch: int, latents: int) -> bool:
    """Whether T (W^T W) T^T costs less than T W^T and the Gram matrices of that."""
    if last.source.shared:
        return False  # the Jacobian has K rows only
    outputs, hidden = last.weight.shape
    rows = batch * latents
    once = 2.0 * outputs * hidden**2 + OPERATIONS_PER_ELEMENT * (outputs * hidden + hidden**2)
    folded = 2.0 * rows * hidden * (hidden + latents) + OPERATIONS_PER_ELEMENT * 3 * rows * hidden
    formed = 2.0 * rows * outputs * (hidden + latents) + OPERATIONS_PER_ELEMENT * rows * (hidden + 2 * outputs)
    return once + folded < formed


def _folded_penalty(last: _jets.Layer, z: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    primal, tangents = last.source.pair()
    x = F.linear(primal, last.weight, last.bias)
    _check_output(x, z)
    dtype = _checks.statistics_dtype(x.dtype)
    # The metric's distance from the identity is a difference of nearly equal numbers: not in a half precision.
    with torch.autocast(x.device.type, enabled=False):
        weight, tangents = last.weight.to(dtype), tangents.to(dtype)
        gram = _perceptron.folded_gram(tangents, weight, last.source.backend)
    return x, penalty_of_gram(gram, kind)


def _decode(decoder: Callable[[Any], Any], z: Tensor, backend: str) -> _jets.Jet:
    """The decoder's output as a jet, its last layer not yet run."""
    if not callable(decoder):
        raise TypeError(f"decoder is a {type(decoder).__name__}; a module or another callable is needed")
    _checks.floating("z", z)
    if z.dim() != 2 or z.shape[1] == 0:
        raise ValueError(f"z has shape {list(z.shape)}; [B, K] with K >= 1 is needed")
    backend = _backends.columns()["tangent_activation"].choose(backend, z)
    if isinstance(decoder, nn.Module):
        for name, module in decoder.named_modules():
            # Before it runs, because a BatchNorm in training mode counts the batch first.
            batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            if batch_norm and (module.training or module.running_mean is None):
                what = f"a {type(module).__name__}" + (f" at {name!r}" if name else "")
                raise ValueError(_jets.over_the_batch(f"decoder has {what} that"))
    units = torch.eye(z.shape[1], dtype=z.dtype, device=z.device).unsqueeze(1)
    latents = _jets.Jet(_jets.Parts(z.unsqueeze(0), units), backend=backend, latent=True)
    jet = getattr(decoder, "_orig_mod", decoder)(latents)  # a compiled module would be compiled anew for a jet
    if isinstance(jet, Tensor):  # whatever the latents
        jet = latents.like(_jets.constant(jet, latents))
    if not isinstance(jet, _jets.Jet):
        raise TypeError(f"decoder returned a {type(jet).__name__}; one tensor [B, *] is needed")
    return jet


def _check_output(x: Tensor, z: Tensor) -> None:
    if x.dim() == 0 or x.shape[0] != z.shape[0]:
        raise ValueError(f"decoder returned shape {list(x.shape)}; [B, *] with B of z, {z.shape[0]}, is needed")
