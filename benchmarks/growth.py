"""How time grows with patches, prompt length and batch: the fitted exponent of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.cases import Case, inputs
from benchmarks.device import describe
from benchmarks.programs import Ours
from qwenvl_mlx.config import read_json
from qwenvl_mlx.layers.cache import Cache
from qwenvl_mlx.media import Media

PICTURES = ((448, 448), (896, 672), (1344, 1008), (1792, 1344))
PROMPTS = (512, 1024, 2048, 4096)
BATCHES = (1, 2, 4, 8, 16)
CHUNK = 512


def _best(run: Callable[[], None], repeats: int = 2) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of log(seconds) over log(size)."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def _vision(program: Ours, config: dict[str, Any]) -> list[tuple[int, float]]:
    points = []
    for picture in PICTURES:
        given = inputs(Case("", picture, 8, 1), config)
        assert given.rows is not None
        assert given.grid is not None
        media = Media("image", given.rows, given.grid)
        took = _best(lambda media=media: mx.eval(program.model.encode([media])[0].embeddings))
        points.append((len(given.rows), took))
    return points


def _prefill(program: Ours, config: dict[str, Any]) -> list[tuple[int, float]]:
    points = []
    for length in PROMPTS:
        ids = inputs(Case("", None, length, 1), config).ids.tolist()
        points.append((length, _best(lambda ids=ids: _filled(program, ids))))
    return points


def _filled(program: Ours, ids: list[int]) -> Cache:
    model = program.model
    cache = model.make_cache()
    embedded = model.embed(ids, [], [])
    for begin in range(0, len(ids), CHUNK):
        mx.eval(model(embedded.slice(begin, begin + CHUNK), cache=cache, last_only=True), cache.arrays)
    return cache


def _batch(program: Ours, config: dict[str, Any]) -> list[tuple[int, float]]:
    points = []
    ids = inputs(Case("", None, 64, 1), config).ids.tolist()
    for rows in BATCHES:
        cache = Cache.merge([_filled(program, ids) for _ in range(rows)])
        tokens = mx.full((rows, 1), ids[0], mx.int32)

        def step(tokens: mx.array = tokens, cache: Cache = cache) -> None:
            for _ in range(4):
                mx.eval(program.model.decode(tokens, cache))

        points.append((rows, _best(step) / 4))
    return points


def measure(folder: Path, *, dtype: str) -> tuple[dict[str, Any], str]:
    """Report and Markdown table: seconds over size, and the exponent of a power law through them."""
    program = Ours(str(folder), dtype)
    config = read_json(folder / "config.json")
    series = {
        "vision, patches": _vision(program, config),
        "prefill, tokens": _prefill(program, config),
        "decode step, rows": _batch(program, config),
    }
    lines = ["| what | size: seconds | exponent |", "|---|---|---|"]
    exponents = {}
    for name, points in series.items():
        exponents[name] = exponent(*zip(*points, strict=True))
        cells = ", ".join(f"{size}: {seconds:.3f}" for size, seconds in points)
        lines.append(f"| {name} | {cells} | {exponents[name]:.2f} |")
    report = {"device": describe(), "dtype": dtype, "series": series, "exponents": exponents}
    return report, "\n".join(lines)
