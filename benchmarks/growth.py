"""How time and memory grow with patches, prompt length and batch: the fitted exponent of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.cases import Case, inputs
from benchmarks.device import describe
from benchmarks.programs import Ours
from qwenvl_mlx.config import read_json
from qwenvl_mlx.engine import EngineOptions
from qwenvl_mlx.layers.cache import Cache
from qwenvl_mlx.media import Media

PICTURES = ((448, 448), (896, 672), (1344, 1008), (1792, 1344), (2016, 1568))  # to 16,128 patches of 14
PROMPTS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
BATCHES = (1, 2, 4, 8, 16)
SLICES = (64, 128, 256, 512, 1024, 2048)
PATIENCE = 20.0  # seconds; after a point that took longer a series ends


@dataclass(frozen=True)
class Point:
    """``held``: the most bytes beside what was there before."""

    size: int
    seconds: float
    held: int


def _point(size: int, run: Callable[[], object]) -> Point:
    """The better of two runs; one that exhausts the patience is not repeated."""
    times: list[float] = []
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    while len(times) < 2 and sum(times) < PATIENCE:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return Point(size, min(times), max(mx.get_peak_memory() - before, 1))


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of log(value) over log(size)."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def _until_slow(points: list[Point], size: int, run: Callable[[], object]) -> bool:
    """Measure one more point; False when the series ends with it."""
    points.append(_point(size, run))
    return points[-1].seconds < PATIENCE


def _vision(program: Ours, config: dict[str, Any]) -> list[Point]:
    points: list[Point] = []
    for picture in PICTURES:
        given = inputs(Case("", picture, 8, 1), config)
        assert given.rows is not None
        assert given.grid is not None
        media = Media("image", given.rows, given.grid)
        if not _until_slow(
            points, len(given.rows), lambda media=media: mx.eval(program.model.encode([media])[0].embeddings)
        ):
            break
    return points


def _prefill(program: Ours, config: dict[str, Any]) -> list[Point]:
    points: list[Point] = []
    for length in PROMPTS:
        ids = inputs(Case("", None, length, 1), config).ids.tolist()
        if not _until_slow(points, length, lambda ids=ids: _filled(program, ids)):
            break
    return points


def _slices(program: Ours, config: dict[str, Any]) -> list[Point]:
    """A prompt as long as the largest slice, read in slices of each size."""
    ids = inputs(Case("", None, SLICES[-1], 1), config).ids.tolist()
    return [_point(size, lambda size=size: _filled(program, ids, size)) for size in SLICES]


def _filled(program: Ours, ids: list[int], slice_size: int = EngineOptions.prefill_chunk) -> Cache:
    model = program.model
    cache = model.make_cache()
    embedded = model.embed(ids, [], [])
    for begin in range(0, len(ids), slice_size):
        logits = model(embedded.slice(begin, begin + slice_size), cache=cache, last_only=True)
        mx.eval(logits, cache.arrays)
    return cache


def _batch(program: Ours, config: dict[str, Any]) -> list[Point]:
    points: list[Point] = []
    ids = inputs(Case("", None, 64, 1), config).ids.tolist()
    for rows in BATCHES:
        cache = Cache.merge([_filled(program, ids) for _ in range(rows)])
        tokens = mx.full((rows, 1), ids[0], mx.int32)
        mx.eval(program.model.decode(tokens, cache))
        _until_slow(points, rows, lambda t=tokens, c=cache: mx.eval(program.model.decode(t, c)))
    return points


def measure(folder: Path, *, dtype: str) -> tuple[dict[str, Any], str]:
    """Report and Markdown table: seconds and bytes over size, and the exponents of power laws through them."""
    program = Ours(str(folder), dtype, time.perf_counter)
    config = read_json(folder / "config.json")
    series = {
        "vision, patches": _vision(program, config),
        "prefill, tokens": _prefill(program, config),
        "decode step, rows": _batch(program, config),
        f"prefill of {SLICES[-1]:,} tokens, size of a slice": _slices(program, config),
    }
    lines = ["| what | size: seconds, MB held | exponent of time | of memory |", "|---|---|---|---|"]
    exponents = {}
    for name, points in series.items():
        sizes = [point.size for point in points]
        fitted = [
            exponent(sizes, [getattr(point, which) for point in points]) for which in ("seconds", "held")
        ]
        exponents[name] = fitted
        cells = "; ".join(f"{p.size:,}: {p.seconds:.3f}, {p.held / 1e6:.0f}" for p in points)
        lines.append(f"| {name} | {cells} | {fitted[0]:.2f} | {fitted[1]:.2f} |")
    report = {
        "device": describe(),
        "dtype": dtype,
        "series": {name: [asdict(point) for point in points] for name, points in series.items()},
        "exponents": exponents,
    }
    return report, "\n".join(lines)
