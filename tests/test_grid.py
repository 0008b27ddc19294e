"""Geometry of patches: windows, segments, resampling; each against the plain loop that it replaces."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from qwenvl_mlx.layers import vision
from qwenvl_mlx.layers.grid import Segments, Windows, bilinear_taps, patch_angles, places
from qwenvl_mlx.layers.vision import VisionAttention

GRIDS = [(1, 4, 4), (1, 6, 10), (3, 10, 4), (1, 2, 30), (2, 14, 18)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("side", [1, 2, 4])
def test_windows_equal_the_loop_over_windows(grid: tuple[int, int, int], side: int) -> None:
    windows = Windows.of(grid, 2, side)
    t, h, w = grid[0], grid[1] // 2, grid[2] // 2
    units = np.arange(t * h * w).reshape(t, h, w)
    blocks = [
        units[frame, top : top + side, left : left + side].ravel()
        for frame in range(t)
        for top in range(0, h, side)
        for left in range(0, w, side)
    ]
    order = np.concatenate(blocks)
    assert np.array_equal(np.array(windows.order).reshape(-1, 4)[:, 0] // 4, order)
    assert np.array_equal(order[np.array(windows.restore)], np.arange(len(order)))

    mx.random.seed(0)
    attention, x = VisionAttention(32, 2), mx.random.normal((t * h * w * 4, 32))
    angles = patch_angles(grid, 2, 16).take(windows.order)
    batched = attention(x, windows.segments.slots(angles), windows.segments)
    looped, begin = [], 0
    for block in blocks:
        piece = slice(begin, begin := begin + 4 * len(block))
        looped.append(
            attention(x[piece], angles.take(mx.arange(piece.start, piece.stop)), Segments(1, 4 * len(block)))
        )
    assert mx.abs(batched - mx.concatenate(looped)).max() < 1e-5  # float32


def test_windows_of_a_large_picture_are_one_attention_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """1036 x 1036: one hundred windows of four different sizes."""
    calls = []
    attend = vision.attend

    def watched(*args: mx.array, **options: object) -> mx.array:
        calls.append(args[0].shape)
        return attend(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(vision, "attend", watched)
    grid = (1, 74, 74)
    windows = Windows.of(grid, 2, 4)
    slots = windows.segments.slots(patch_angles(grid, 2, 16).take(windows.order))
    VisionAttention(32, 2)(mx.zeros((74 * 74, 32)), slots, windows.segments)
    assert calls == [(100, 2, 64, 16)]


def test_patch_order() -> None:
    row, column = places((1, 4, 4), 2)
    assert list(zip(row.tolist(), column.tolist(), strict=True))[:6] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (0, 2),
        (0, 3),
    ]


@pytest.mark.parametrize("grid", [(1, 2, 2), (1, 6, 10), (1, 24, 4)])
def test_table_is_read_corners_on_corners(grid: tuple[int, int, int]) -> None:
    side = 5
    table = np.random.default_rng(0).normal(size=(side, side))
    found = sum(table.ravel()[index] * share for index, share in bilinear_taps(grid, 2, side))
    rows = np.linspace(0, side - 1, grid[1])
    columns = np.linspace(0, side - 1, grid[2])
    between = np.array([np.interp(columns, np.arange(side), line) for line in table])  # [side, w]
    wanted = np.array([np.interp(rows, np.arange(side), line) for line in between.T]).T
    assert np.allclose(found, wanted[places(grid, 2)], atol=1e-5)
