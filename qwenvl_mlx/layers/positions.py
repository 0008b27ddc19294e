"""Position tables of the original Qwen-VL, resampled once at load.

Same numbers as torch's bicubic ``interpolate`` with ``align_corners=False`` and no antialiasing.
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

CUBIC = -0.75  # the free parameter of the cubic convolution kernel, as torch has it (Pillow: -0.5)


def resample_table(table: mx.array, rows: int) -> mx.array:
    """A square table ``[s*s, channels]`` at another resolution: ``[rows, channels]``, in the table's dtype."""
    source, target = math.isqrt(table.shape[0]), math.isqrt(rows)
    if source == target:
        return table
    weights = _bicubic(source, target)
    image = np.array(table.astype(mx.float32)).reshape(source, source, -1)
    image = np.einsum("yi,xj,ijc->yxc", weights, weights, image, optimize=True)
    return mx.array(image.reshape(target * target, -1).astype(np.float32)).astype(table.dtype)


def _bicubic(source: int, target: int) -> NDArray[np.float32]:
    """How much each of ``source`` samples adds to each of ``target``: ``[target, source]``."""
    centre = (np.arange(target) + 0.5) * source / target - 0.5
    taps = np.floor(centre).astype(int)[:, None] + np.arange(-1, 3)  # [target, 4]
    distance = np.abs(centre[:, None] - taps)
    near = (CUBIC + 2) * distance**3 - (CUBIC + 3) * distance**2 + 1
    far = CUBIC * (distance**3 - 5 * distance**2 + 8 * distance - 4)
    weights = np.zeros((target, source))
    rows = np.arange(target)[:, None]
    np.add.at(weights, (rows, taps.clip(0, source - 1)), np.where(distance <= 1, near, far))
    return weights.astype(np.float32)
