"""Turn pictures into rows of patches: smart resize, bicubic, and the reference processors' row order."""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qwenvl_mlx.errors import MediaError
from qwenvl_mlx.media import Media
from qwenvl_mlx.processor.resample import Bytes, strips
from qwenvl_mlx.processor.rules import PatchRules

MAX_ASPECT = 200


def smart_resize(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int, frames: int | None = None
) -> tuple[int, int]:
    """The size ``(height, width)`` a picture is brought to: multiples of ``factor`` with an area within the limits.

    Python's ``round`` (half to even) is part of the rule. With ``frames`` it is the rule of Qwen3-VL's videos: the
    limits hold for all frames together, rounded to an even number, and a side below ``factor`` is enlarged first.
    Raises ``MediaError`` for sides of more than 200:1.
    """
    if frames is not None and min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise MediaError(
            f"{width}x{height} is longer than {MAX_ASPECT}:1, which the model can't see: crop it"
        )
    count = 1 if frames is None else max(frames, 2)  # a single frame will be repeated
    paired = 1 if frames is None else round(count / 2) * 2
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if paired * rows * columns > max_pixels:
        shrink = math.sqrt(count * height * width / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif paired * rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (count * height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return rows, columns


def image_media(picture: Image.Image, rules: PatchRules) -> Media:
    """A still, RGB and upright, as bytes ``[gh*gw, 3*p*p]`` in blocks of 2x2 patches; temporal copies are implied."""
    height, width = smart_resize(
        picture.height,
        picture.width,
        factor=rules.factor,
        min_pixels=rules.min_pixels,
        max_pixels=rules.max_pixels,
    )
    rows = allocate((1, height, width), rules, copies=1)
    cut(picture, rows[0, :, :, :, :, :, 0], (width, height))
    return media_of("image", rows, rules, source_size=picture.size)


def allocate(shape: tuple[int, int, int], rules: PatchRules, *, copies: int) -> Bytes:
    """Room for the rows of ``(groups, height, width)`` with ``copies`` frames a group.

    Axes: group, block row, block column, patch of the block (row, column), channel, frame, y, x.
    """
    groups, height, width = shape
    merge, patch = rules.merge_size, rules.patch_size
    blocks = (height // rules.factor, width // rules.factor)
    return np.empty((groups, *blocks, merge, merge, 3, copies, patch, patch), np.uint8)


def cut(picture: Image.Image, rows: Bytes, size: tuple[int, int]) -> None:
    """Resize ``picture`` to ``size`` (width, height) and lay its patches into ``rows``.

    ``rows``: ``[block row, block column, row, column, channel, y, x]``, one group and frame of ``allocate``.
    """
    _, across, merge, _, _, patch, _ = rows.shape
    for block, strip in zip(rows, strips(picture, *size, merge * patch), strict=True):
        pixels = strip.reshape(merge, patch, across, merge, patch, 3)
        block[...] = pixels.transpose(2, 0, 3, 5, 1, 4)  # [block column, row, column, channel, y, x]


def media_of(
    kind: str,
    rows: Bytes,
    rules: PatchRules,
    *,
    source_size: tuple[int, int],
    seconds_per_grid: float | None = None,
    timestamps: tuple[float, ...] | None = None,
) -> Media:
    """Rows as ``allocate`` lays them out -> Media, with a digest of what the model will see."""
    groups, down, across, merge = rows.shape[:4]
    patches = rows.reshape(groups * down * across * merge * merge, -1)
    grid = (groups, down * merge, across * merge)
    digest = hashlib.sha256(
        f"{kind} {grid} {seconds_per_grid} {timestamps} {rules.mean} {rules.std}".encode()
    )
    digest.update(patches.data)
    return Media(
        kind="image" if kind == "image" else "video",
        patches=patches,
        grid=grid,
        seconds_per_grid=seconds_per_grid,
        timestamps=timestamps,
        mean=rules.mean,
        std=rules.std,
        source_size=source_size,
        digest=digest.hexdigest()[:32],
    )


def normalised_rows(media: Media, *, temporal_patch_size: int = 2) -> NDArray[np.float32]:
    """The rows as the reference gives them: float32 ``[n, 3*T*p*p]``, a still's temporal copies written out."""
    rows = np.asarray(media.patches)
    if rows.dtype != np.uint8:
        return rows.astype(np.float32, copy=False)
    copies = 1 if media.kind == "image" else temporal_patch_size
    pixels = rows.reshape(len(rows), 3, copies, -1).astype(np.float32) / np.float32(255)
    mean = np.array(media.mean or (0, 0, 0), np.float32).reshape(3, 1, 1)
    std = np.array(media.std or (1, 1, 1), np.float32).reshape(3, 1, 1)
    pixels = np.repeat((pixels - mean) / std, temporal_patch_size // copies, axis=2)
    return pixels.reshape(len(rows), -1)
