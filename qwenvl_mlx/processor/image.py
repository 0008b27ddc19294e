"""Cut a picture for the original Qwen-VL: one square of fixed size, normalised as CLIP's pictures were."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qwenvl_mlx.media import Media

if TYPE_CHECKING:
    from PIL.Image import Image

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def square_image(image: Image, *, size: int, patch: int) -> Media:
    """An RGB picture as Media with patches ``[3, size, size]``; its aspect ratio is not kept (the reference's rule)."""
    side = size // patch
    return Media("image", normalise(resize(image, size)), grid=(1, side, side), source_size=image.size)


def resize(image: Image, size: int) -> NDArray[np.uint8]:
    """Pillow's bicubic: antialiased when it shrinks, rounded to bytes. RGB -> ``[size, size, 3]``."""
    from PIL.Image import Resampling

    return np.asarray(image.resize((size, size), Resampling.BICUBIC))


def normalise(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """``[H, W, 3]`` bytes -> ``[3, H, W]`` float32, in the reference's order of operations."""
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32)
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (MEAN, STD))
    planes /= np.float32(255)
    planes -= mean
    planes /= std
    return planes
