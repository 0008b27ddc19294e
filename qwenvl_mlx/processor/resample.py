"""Pillow's bicubic resize a strip at a time, so that a large picture needs little memory beside its rows.

Pillow resizes in two one-dimensional passes over bytes. A horizontal pass knows nothing of other rows, so Pillow does
it here band by band. A vertical pass can't be cut that way (Pillow takes the place of a band as 32-bit floats, which
shifts it by a little), so it is done here with Pillow's own fixed-point weights. The result equals Pillow's exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_BITS = 22  # of a weight's fraction in Pillow's fixed-point passes
_LINES = 14  # rows that are summed at a time, in integers of 32 bits
_REACH = 2.0  # of the cubic kernel, in source pixels when enlarging

Bytes = NDArray[np.uint8]


class _Taps(NamedTuple):
    """Which source rows make each target row: from ``first`` to before ``last``, by ``weights [target, k]``."""

    first: NDArray[np.int64]
    last: NDArray[np.int64]
    weights: NDArray[np.int32]

    def part(self, begin: int, end: int) -> _Taps:
        return _Taps(self.first[begin:end], self.last[begin:end], self.weights[begin:end])


def strips(picture: Image.Image, width: int, height: int, step: int) -> Iterator[Bytes]:
    """``picture`` (RGB) resized to ``width`` x ``height``, in strips ``[step, width, 3]``; ``step`` divides ``height``.

    The passes round to bytes, so their order shows: like Pillow 13, whichever is installed, the vertical one comes
    first where the height loses more than twice what the width does.
    """
    lost = picture.height - height
    if lost == 0:
        yield from (_wide(_band(picture, top, top + step), width) for top in range(0, height, step))
    elif lost > max(0, 2 * (picture.width - width)):
        for strip in _vertical(picture, picture.width, height, step):
            yield _wide(Image.fromarray(strip), width)
    else:
        yield from _vertical(picture, width, height, step)


def _band(picture: Image.Image, top: int, bottom: int) -> Image.Image:
    return picture.crop((0, top, picture.width, bottom))


def _wide(band: Image.Image, width: int) -> Bytes:
    """A picture resized in width only: ``[height, width, 3]``."""
    if width != band.width:
        band = band.resize((width, band.height), Image.Resampling.BICUBIC)
    return np.asarray(band)


def _vertical(picture: Image.Image, width: int, height: int, step: int) -> Iterator[Bytes]:
    """Strips of the vertical pass over rows that were first brought to ``width``."""
    taps = _taps(picture.height, height)
    lines = min(_LINES, step)
    sources = int((taps.last[lines - 1 :] - taps.first[: height - lines + 1]).max())
    room = np.empty(
        (2 * lines + sources, width * 3), np.int32
    )  # made once: fresh memory costs more than the sums
    rows = np.empty((0, width * 3), np.uint8)  # source rows [begin, end) of the strip at hand
    begin = end = 0
    for top in range(0, height, step):
        first, last = int(taps.first[top]), int(taps.last[top + step - 1])
        rows = rows[first - begin :]
        if last > end:
            fresh = _wide(_band(picture, max(end, first), last), width)
            rows = np.concatenate([rows, fresh.reshape(-1, width * 3)])
        begin, end = first, max(end, last)
        strip = np.empty((step, width * 3), np.uint8)
        for low in range(0, step, lines):
            part = taps.part(top + low, top + min(low + lines, step))
            _weigh(
                rows[part.first[0] - begin : part.last[-1] - begin], part, room, out=strip[low : low + lines]
            )
        yield strip.reshape(step, width, 3)


def _weigh(rows: Bytes, taps: _Taps, room: NDArray[np.int32], *, out: Bytes) -> None:
    """Weighted sums of ``rows`` (from the first to the last that ``taps`` name), rounded to bytes."""
    count = len(out)
    sums, term, near = room[:count], room[count : 2 * count], room[2 * count : 2 * count + len(rows)]
    near[...] = rows
    sums.fill(1 << (_BITS - 1))
    for offset, weights in enumerate(
        taps.weights.T[:, :, None]
    ):  # few large operations: threads run side by side
        if not weights.any():  # a fifth source row is seldom within the kernel's reach
            continue
        index = np.minimum(
            taps.first - taps.first[0] + offset, len(rows) - 1
        )  # what lies past the end weighs nothing
        in_line = bool((index[1:] - index[:-1] == 1).all())
        np.multiply(near[index[0] : index[-1] + 1] if in_line else near[index], weights, out=term)
        np.add(sums, term, out=sums)
    np.right_shift(sums, _BITS, out=sums)
    np.clip(sums, 0, 255, out=sums)
    out[...] = sums


def _taps(source: int, target: int) -> _Taps:
    """Pillow's weights for ``source`` rows to ``target``: the kernel grows when shrinking, edges renormalise."""
    scale = source / target
    stretch = max(scale, 1.0)
    centre = (np.arange(target) + 0.5) * scale
    first = np.maximum((centre - _REACH * stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + _REACH * stretch + 0.5).astype(np.int64), source)
    offset = np.arange(int((last - first).max()))
    distance = (first[:, None] + offset - centre[:, None] + 0.5) * (1.0 / stretch)
    weights = np.where(offset < (last - first)[:, None], _cubic(np.abs(distance)), 0.0)  # [target, k]
    weights /= weights.sum(axis=1, keepdims=True)
    fixed = np.trunc(weights * (1 << _BITS) + np.where(weights < 0, -0.5, 0.5)).astype(np.int32)
    return _Taps(first, last, fixed)


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic kernel with a = -1/2, for x >= 0."""
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
