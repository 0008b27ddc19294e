"""exp for processors on which MLX computes it number by number (x86): a fifth of the time, and more exact.

``exp(x) = 2^e exp(r)``: ``e`` goes into the exponent's bits, ``exp(r)`` is a polynomial, and each kernel is so plain
that the compiler makes vector instructions of it. Infinities are not taken: masks must be finite.
"""

from __future__ import annotations

import math
import platform

import mlx.core as mx

LOG2_E = 1 / math.log(2)
LN2_HIGH = 0.693359375  # exact in few bits, so that a product with an exponent is exact
LN2_LOW = math.log(2) - LN2_HIGH
TAYLOR = [1 / math.factorial(power) for power in range(8)]  # |r| <= ln(2)/2: to 5e-9
SMALL = 1 << 14  # numbers for which the kernels' own cost outweighs what they save


def exp_pays(x: mx.array) -> bool:
    """Whether ``exp`` is faster than ``mx.exp`` for such an array, here."""
    slow = mx.default_device() == mx.cpu and platform.machine() in ("x86_64", "AMD64")
    return bool(slow) and x.dtype == mx.float32 and x.size > SMALL


def exp(x: mx.array, rate: float = 1.0) -> mx.array:
    """``e^(rate x)`` in float32; 0 below -88, infinite above 88."""
    rest, power = _factors(x, rate)
    return rest * power


def swish(x: mx.array, *, slope: mx.array | None = None, rate: float = 1.0) -> mx.array:
    """``x sigmoid(rate slope)``; the slope is ``x`` itself where none is given."""
    return _over(x, *_factors(x if slope is None else slope, -rate))


def swish_times(x: mx.array, other: mx.array) -> mx.array:
    """``x sigmoid(x) other``."""
    return _over_times(x, *_factors(x, -1.0), other)


def _factors(x: mx.array, rate: float) -> tuple[mx.array, mx.array]:
    """``exp(r)`` and ``2^e``, whose product is ``e^(rate x)``."""
    exponent = _exponent(x, rate)
    return _polynomial(x, exponent, rate), mx.view(_bits(exponent), mx.float32)


@mx.compile
def _over(x: mx.array, rest: mx.array, power: mx.array) -> mx.array:
    return x / (1 + rest * power)


@mx.compile
def _over_times(x: mx.array, rest: mx.array, power: mx.array, other: mx.array) -> mx.array:
    return x / (1 + rest * power) * other


@mx.compile
def _exponent(x: mx.array, rate: float) -> mx.array:
    """Biased as float32 keeps it."""
    return (x * (rate * LOG2_E) + 127.5).astype(mx.int32)


@mx.compile
def _polynomial(x: mx.array, exponent: mx.array, rate: float) -> mx.array:
    """``e^(rate x)`` of what the exponent leaves of ``x``."""
    power = exponent.astype(mx.float32) - 127
    rest = (x * rate - power * LN2_HIGH) - power * LN2_LOW
    square = rest * rest
    pairs = [TAYLOR[k] + rest * TAYLOR[k + 1] for k in range(0, 8, 2)]
    return (pairs[0] + square * pairs[1]) + (square * square) * (pairs[2] + square * pairs[3])


@mx.compile
def _bits(exponent: mx.array) -> mx.array:
    return mx.minimum(mx.maximum(exponent, 0), 255) << 23
