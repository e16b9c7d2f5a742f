"""What the ops on diagonal Gaussians share: exponentials of log-variances."""

from __future__ import annotations

import math

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1 / math.log(2))
# log(2) in two parts (Cody and Waite): the first has 9 bits.
_LN_2_HIGH = tl.constexpr(0.693359375)
_LN_2_LOW = tl.constexpr(math.log(2) - 0.693359375)


@triton.jit
def exp(x):
    """``e^x``, as good for large x as for small.

    tl.exp of float32 is ``2^(x log2(e))``, and as that product grows, so does what rounding it costs. Here it is cut
    after five binary places, and ``e^x = 2^cut e^(x - cut log(2))``, whose difference is exact but for its last bit.
    """
    if x.dtype == tl.float64:
        value = tl.exp(x)
    else:
        cut = tl.floor(x * (32 * _LOG2_E)) * (1 / 32)
        rest = x - cut * _LN_2_HIGH - cut * _LN_2_LOW
        value = tl.exp2(cut) * tl.exp(tl.where(tl.abs(cut) < 256, rest, 0.0))
    return value
