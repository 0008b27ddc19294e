"""What the host pays for a decoded token: building its graph, anew or by a compiled step, and letting go of it.

    python -m benchmarks host

Depth decides the time and width does not, so the models are narrow. With the fused operations as on a GPU (stand-ins
of one node each) and as on a CPU, where they decompose. CPU time of one thread, the least and the median of many.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import mlx.core as mx

from benchmarks.counts import metal_view
from benchmarks.device import describe
from benchmarks.launches import built, narrow
from qwenvl_mlx.engine.step import CompiledStep, Decoding
from qwenvl_mlx.sizes import SIZES

NAMES = ("Qwen-VL-Chat", "Qwen2.5-VL-3B", "Qwen3-VL-8B")
ROUNDS = 20


def clock(build: Callable[[], Any]) -> str:
    """Milliseconds of building, and of letting go."""
    spent: list[float] = []
    kept: list[Any] = []
    for _ in range(2):  # the first round fetches the memory
        kept.clear()
        spent.clear()
        for _ in range(ROUNDS):
            start = time.thread_time()
            kept.append(build())
            spent.append(1e3 * (time.thread_time() - start))
    start = time.thread_time()
    kept.clear()
    freed = 1e3 * (time.thread_time() - start) / ROUNDS
    return f"{min(spent):.2f} | {statistics.median(spent):.2f} | {freed:.2f}"


def rows(name: str, bits: int | None, *, single: bool) -> dict[str, str]:
    """One decoded token called directly, and compiled; ``single``: with the fused operations as on a GPU."""
    gc.disable()
    with metal_view() if single else contextlib.nullcontext():
        model, cache = built(narrow(SIZES[name]), bits=bits)
        tokens = mx.array([[5]])
        direct = clock(lambda: model.decode(tokens, cache))
        model, cache = built(narrow(SIZES[name]), bits=bits)
        step = CompiledStep(model)
        decoding = Decoding(step, cache)
        mx.eval(step.compiled(tokens, *decoding.inputs))
        return {"direct": direct, "compiled": clock(lambda: step.compiled(tokens, *decoding.inputs))}


def measure() -> tuple[dict[str, Any], str]:
    """The report and its Markdown table. Each row is of a process of its own: what was freed before costs time."""
    report: dict[str, Any] = {"device": describe()}
    lines = [
        "| shape | bits | fused operations | step | ms, least | median | letting go |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, bits, single in itertools.product(NAMES, (None, 4), (True, False)):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found = pool.submit(rows, name, bits, single=single).result()
        layers = SIZES[name].get("text_config", SIZES[name])["num_hidden_layers"]
        where = "one node each, as on a GPU" if single else "decomposed"
        for how, row in found.items():
            report[f"{name}, {bits or 16} bits, {where}, {how}"] = row
            lines.append(f"| {name}, {layers} layers | {bits or 16} | {where} | {how} | {row} |")
    return report, "\n".join(lines)
