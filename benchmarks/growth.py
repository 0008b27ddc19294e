"""How time and memory grow with patches, prompt length and batch: the fitted exponent of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.cases import Case, inputs
from benchmarks.device import describe
from benchmarks.programs import Ours, read
from qwenvl_mlx.layers.cache import Cache
from qwenvl_mlx.media import Media

PICTURES = ((448, 448), (896, 672), (1344, 1008), (1792, 1344), (2016, 1568))  # to 16,128 patches of 14
PROMPTS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
BATCHES = (1, 2, 4, 8, 16)
SLICES = (64, 128, 256, 512, 768, 1024, 2048)


@dataclass(frozen=True)
class Point:
    """``held``: the most bytes beside what was there before."""

    size: int
    seconds: float
    held: int


def _point(size: int, run: Callable[[], object], patience: float) -> Point:
    """The better of two runs; one that exhausts the patience is not repeated."""
    times: list[float] = []
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    while not times or (len(times) < 2 and sum(times) < patience):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return Point(size, min(times), max(mx.get_peak_memory() - before, 1))


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """Slope of log(value) over log(size); a single point has none."""
    if len(sizes) < 2:
        return None
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def _until_slow(runs: Iterable[tuple[int, Callable[[], object]]], patience: float) -> list[Point]:
    """A point for each size, up to the first that exhausts the patience."""
    points: list[Point] = []
    for size, run in runs:
        points.append(_point(size, run, patience))
        if points[-1].seconds > patience:
            break
    return points


Runs = Iterator[tuple[int, Callable[[], object]]]


def _vision(program: Ours) -> Runs:
    for picture in PICTURES:
        given = inputs(Case("", picture, 8, 1), program.config)
        assert given.rows is not None
        assert given.grid is not None
        media = Media("image", given.rows, given.grid)
        yield len(given.rows), lambda media=media: mx.eval(program.model.encode([media])[0].embeddings)


def _prefill(program: Ours) -> Runs:
    for length in PROMPTS:
        ids = inputs(Case("", None, length, 1), program.config).ids.tolist()
        yield length, lambda ids=ids: _filled(program, ids)


def _slices(program: Ours) -> Runs:
    """A prompt as long as the largest slice, read in slices of each size."""
    ids = inputs(Case("", None, SLICES[-1], 1), program.config).ids.tolist()
    for size in SLICES:
        yield size, lambda size=size: _filled(program, ids, size)


def _batch(program: Ours) -> Runs:
    ids = inputs(Case("", None, 64, 1), program.config).ids.tolist()
    for rows in BATCHES:
        cache = Cache.merge([_filled(program, ids) for _ in range(rows)])
        tokens = mx.full((rows, 1), ids[0], mx.int32)
        mx.eval(program.model.decode(tokens, cache))
        yield rows, lambda t=tokens, c=cache: mx.eval(program.model.decode(t, c))


def _filled(program: Ours, ids: list[int], slice_size: int | None = None) -> Cache:
    model = program.model
    cache = model.make_cache()
    mx.eval(read(model, model.embed(ids, [], []), cache, slice_size))
    return cache


def measure(folder: Path, *, dtype: str, patience: float) -> tuple[dict[str, Any], str]:
    """Report and Markdown table: seconds and bytes over size, and the exponents of power laws through them.

    A series ends with the first point that took more seconds than ``patience``.
    """
    program = Ours(str(folder), dtype, time.perf_counter)
    runs = {
        "vision, patches": _vision,
        "prefill, tokens": _prefill,
        "decode step, rows": _batch,
        f"prefill of {SLICES[-1]:,} tokens, size of a slice": _slices,
    }
    series = {name: _until_slow(make(program), patience) for name, make in runs.items()}
    lines = ["| what | size: seconds, MB held | exponent of time | of memory |", "|---|---|---|---|"]
    exponents = {}
    for name, points in series.items():
        sizes = [point.size for point in points]
        fitted = [
            exponent(sizes, [getattr(point, which) for point in points]) for which in ("seconds", "held")
        ]
        exponents[name] = fitted
        cells = "; ".join(f"{p.size:,}: {p.seconds:.3f}, {p.held / 1e6:.0f}" for p in points)
        lines.append(f"| {name} | {cells} | {' | '.join('–' if e is None else f'{e:.2f}' for e in fitted)} |")
    report = {
        "device": describe(),
        "dtype": dtype,
        "series": {name: [asdict(point) for point in points] for name, points in series.items()},
        "exponents": exponents,
    }
    return report, "\n".join(lines)
