"""Each figure as a fraction of what the device allows: bytes for decoding, operations for prefill and vision."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from benchmarks.cases import CASES, inputs
from benchmarks.device import bandwidth, describe, matmul_rate
from benchmarks.programs import Ours
from qwenvl_mlx.config import read_json
from qwenvl_mlx.engine.kv import kv_cost


def _elements(model: Any, prefix: str) -> int:
    """Weights of the matrices under ``prefix``, counted unpacked: a product takes two operations for each."""
    total = 0
    for name, array in tree_flatten(model.parameters()):
        if name.startswith(prefix) and array.ndim >= 2 and not name.endswith(("scales", "biases")):
            packed = array.dtype == mx.uint32
            total += array.size * (8 if packed else 1)
    return total


def measure(folder: Path, *, dtype: str, rounds: int = 3) -> tuple[dict[str, Any], str]:
    """Report and Markdown table of vision, prefill and decode against the measured limits of this device."""
    program = Ours(str(folder), dtype, time.perf_counter)
    config = read_json(folder / "config.json")
    rate, bytes_a_second = matmul_rate(getattr(mx, dtype)), bandwidth()
    tower = _elements(program.model, "vision_tower")
    decoder = _elements(program.model, "language_model.model.layers")
    weight_bytes = sum(
        array.nbytes
        for name, array in tree_flatten(program.model.parameters())
        if name.startswith("language_model")
    )
    a_token = kv_cost(program.model, None).token
    rows = []
    for case in CASES:
        given = inputs(case, config)
        runs = [program.run(case, given)[0] for _ in range(rounds + 1)][1:]
        took = {part: statistics.median(run[part] for run in runs) for part in runs[0]}
        patches = 0 if given.rows is None else len(given.rows)
        row = {"case": case.name, **took}
        row["vision of peak"] = 2 * tower * patches / took["vision"] / rate if patches else None
        row["prefill of peak"] = 2 * decoder * len(given.ids) / took["prefill"] / rate
        moved = weight_bytes + a_token * (len(given.ids) + case.new_tokens / 2)
        row["decode of bandwidth"] = moved / took["decode"] / bytes_a_second
        rows.append(row)
    report = {
        "device": describe(),
        "dtype": dtype,
        "matmul": rate,
        "bandwidth": bytes_a_second,
        "results": rows,
    }
    head = f"matmul {rate / 1e9:.0f} GFLOPS, bandwidth {bytes_a_second / 1e9:.1f} GB/s (measured here)"
    lines = [head, "", "| case | vision | prefill | decode |", "|---|---|---|---|"]
    for row in rows:
        shares = (row["vision of peak"], row["prefill of peak"], row["decode of bandwidth"])
        cells = " | ".join("–" if share is None else f"{share:.0%}" for share in shares)
        lines.append(f"| {row['case']} | {cells} |")
    return report, "\n".join(lines)
