"""Powers for processors on which MLX computes them number by number (x86): a tenth of the time, and as exact.

``2^(y + 1/2) = 2^n 2^(g + 1/2)``, where ``n`` is the whole number next to ``y`` and ``|g| <= 1/2``. The second factor
lies between 1 and 2: less 1 it is the fraction of a float32, and ``n`` its exponent. Nothing branches, so that the
compiler makes vector instructions of it, and all is one kernel.
"""

from __future__ import annotations

import math
import platform

import mlx.core as mx

LOG2_E = 1 / math.log(2)
# 2^(g + 1/2) - 1 in powers of g, least squares at Chebyshev's points: to 2e-9
FRACTION = (0.41421356, 0.98025818, 0.33973159, 0.07849348, 0.013601942, 0.0018951073, 0.00021877505)
BITS = 23  # of a fraction
ROUND = 1.5 * 2**BITS  # added and taken away again it leaves whole numbers
SMALL = 1 << 11  # numbers for which the kernels' own cost outweighs what they save


def exp_pays(x: mx.array) -> bool:
    """Whether these functions are faster than ``mx.exp`` for such an array, here."""
    return exps_pay(x.size, x.dtype)


def exps_pay(count: int, dtype: mx.Dtype) -> bool:
    """``exp_pays`` of an array that is yet to be made."""
    slow = mx.default_device() == mx.cpu and platform.machine() in ("x86_64", "AMD64")
    return bool(slow) and dtype == mx.float32 and count > SMALL


def exp2_below(x: mx.array, top: mx.array) -> mx.array:
    """``2^(x - top)`` of float32 that are nowhere above ``top`` nor 4e6 below it; ``top`` broadcasts."""
    if exp_pays(x):
        return mx.view(_bits(x - (top + 0.5)), mx.float32)
    return mx.exp((x - top) / LOG2_E)


def swish(x: mx.array, *, slope: mx.array | None = None, rate: float = 1.0) -> mx.array:
    """``x sigmoid(rate slope)``; the slope is ``x`` itself where none is given."""
    return _over(x, _exp(x if slope is None else slope, -rate))


def swish_times(x: mx.array, other: mx.array) -> mx.array:
    """``x sigmoid(x) other``."""
    return _over_times(x, _exp(x, -1.0), other)


def _exp(x: mx.array, rate: float) -> mx.array:
    """``e^(rate x)``, 3e38 at most."""
    return mx.view(_bits(_clipped(x, rate)), mx.float32)


@mx.compile
def _over(x: mx.array, power: mx.array) -> mx.array:
    return x / (1 + power)


@mx.compile
def _over_times(x: mx.array, power: mx.array, other: mx.array) -> mx.array:
    return x / (1 + power) * other


@mx.compile
def _clipped(x: mx.array, rate: float) -> mx.array:
    return mx.minimum(mx.maximum(x * (rate * LOG2_E) - 0.5, -127.6), 127.4)


@mx.compile
def _bits(y: mx.array) -> mx.array:
    """``2^(y + 1/2)`` as float32 keeps it, where ``-4e6 < y < 127.5``."""
    n = (y + ROUND) - ROUND
    g = y - n
    square = g * g
    c = [number * 2**BITS for number in FRACTION]
    low = (c[0] + g * c[1]) + square * (c[2] + g * c[3])
    high = (c[4] + g * c[5]) + square * c[6]
    fraction = (low + (square * square) * high).astype(mx.int32)
    exponent = mx.maximum(n.astype(mx.int32), -128) + 127
    return mx.maximum((exponent << BITS) + fraction, 0)
