"""Each figure as a fraction of what the device allows: bytes for decoding, operations for prefill and vision."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from benchmarks import launches
from benchmarks.cases import CASES, Case, Inputs, inputs
from benchmarks.counts import metal_view
from benchmarks.device import bandwidth, describe, matmul_rate
from benchmarks.programs import Ours
from qwenvl_mlx.engine.kv import kv_cost
from qwenvl_mlx.media import Media


def measure(
    folder: Path, *, dtype: str, rounds: int = 3, cases: Sequence[Case] = CASES
) -> tuple[dict[str, Any], str]:
    """Report and Markdown table of vision, prefill and decode against the measured limits of this device."""
    program = Ours(str(folder), dtype, time.perf_counter)
    rate, bytes_a_second = matmul_rate(getattr(mx, dtype)), bandwidth()
    read = _weight_bytes(program.model, program.config)
    a_token = kv_cost(program.model, None).token
    rows = []
    for case in cases:
        given = inputs(case, program.config)
        runs = [program.run(case, given)[0] for _ in range(rounds + 1)][1:]
        took = {part: statistics.median(run[part] for run in runs) for part in runs[0]}
        vision, prefill = _operations(program.model, given)
        prefill *= case.batch
        moved = read + a_token * (len(given.ids) + case.new_tokens / 2) * case.batch
        share = {
            "vision of peak": vision / took["vision"] / rate if vision else None,
            "prefill of peak": prefill / took["prefill"] / rate,
            "decode of bandwidth": moved / took["decode"] / bytes_a_second,
        }
        rows.append({"case": case.name, "vision flops": vision, "prefill flops": prefill, **took, **share})
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


def _operations(model: Any, given: Inputs) -> tuple[int, int]:
    """Of the products that encode the picture and read the prompt, counted from their graphs."""
    with metal_view():
        cost = launches.prefill(model, model.make_cache(), [1] * len(given.ids))
        if given.rows is None or given.grid is None:
            return 0, cost.flops
        return launches.vision(model, Media("image", given.rows, given.grid)).flops, cost.flops


def _weight_bytes(model: Any, config: dict[str, Any]) -> float:
    """What a token reads of the decoder: chosen experts alone, and no table that is not the output layer too."""
    tied = "lm_head" not in model.language_model
    chosen = config.get("text_config", config).get("num_experts_per_tok", 0)
    return sum(
        array.nbytes * (chosen / len(array) if ".switch_mlp." in name else 1)
        for name, array in tree_flatten(model.language_model.parameters())
        if tied or not name.startswith("model.embed_tokens")
    )
