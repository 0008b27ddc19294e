"""How long a command takes to its first token on a tiny model, and how long import and load take: ours and mlx-vlm's.

python -m benchmarks startup --peer-python PATH     # of an environment that has mlx-vlm
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.device import describe

DEMO = Path(__file__).parents[1] / "qwenvl_mlx" / "demo"
QUESTION = ("--prompt", "Describe the picture.", "--max-tokens", "1", "--temperature", "0")


def measure(folder: Path, *, peer_python: str | None, rounds: int) -> tuple[dict[str, Any], str]:
    """Report and Markdown table: wall and processor seconds of whole processes, medians of runs in turn."""
    picture = sorted((DEMO / "samples").glob("*.png"))[0]
    asked = ("--model", str(folder), "--image", str(picture), *QUESTION)
    works = {
        "to the first token": (("-m", "qwenvl_mlx.generate", *asked), ("-m", "mlx_vlm.generate", *asked)),
        "import and load": tuple(
            ("-c", f"from {package} import load; load({str(folder)!r})")
            for package in ("qwenvl_mlx", "mlx_vlm")
        ),
    }
    results = []
    for name, (ours, theirs) in works.items():
        commands = {"qwenvl-mlx": [sys.executable, *ours]}
        if peer_python:
            commands["mlx-vlm"] = [peer_python, *theirs]
        samples: dict[str, list[tuple[float, float]]] = {program: [] for program in commands}
        for turn in range(rounds + 1):
            for program, command in commands.items():
                took = _run(command)
                if turn:  # the first round fills the disk's cache
                    samples[program].append(took)
        results.append({"work": name, "samples": samples})
    lines = ["| what | program | wall s | processor s |", "|---|---|---|---|"]
    for result in results:
        mine = result["samples"]["qwenvl-mlx"]
        for program, taken in result["samples"].items():
            cells = []
            for clock in range(2):
                median = statistics.median(sample[clock] for sample in taken)
                ratio = statistics.median(a[clock] / b[clock] for a, b in zip(mine, taken, strict=True))
                cells.append(f"{median:.2f}" + ("" if taken is mine else f" (ours ×{ratio:.2f})"))
            lines.append(f"| {result['work']} | {program} | {' | '.join(cells)} |")
    return {"device": describe(), "results": results}, "\n".join(lines)


def _run(command: Sequence[str]) -> tuple[float, float]:
    before, start = os.times(), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    after = os.times()
    worked = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, worked
