"""Ours against PyTorch and other MLX programs: same weights, prompts and pictures, measured in turn."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.blas import environment
from benchmarks.cases import CASES, Case
from benchmarks.device import describe
from benchmarks.programs import BLIND

NEEDS = {"qwenvl-mlx": "mlx", "torch": "transformers", "mlx-vlm": "mlx_vlm", "mlx-lm": "mlx_lm"}
PARTS = ("preprocess", "vision", "prefill", "first token", "decode")


@dataclass
class Result:
    """Samples of one program at one case, in seconds; ``difference``: largest of the last logits against the first."""

    program: str
    case: str
    samples: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    batch: int = 1
    peak: int = 0
    vision_bytes: int = 0
    difference: float = 0.0

    def median(self, part: str) -> float:
        return statistics.median(self.samples[part])


class Worker:
    """One program in its own process."""

    def __init__(self, name: str, folder: Path, options: Sequence[str], python: str, cores: int) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.programs", name, str(folder), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment(name, cores),
        )
        self.loaded = self._answer()

    def run(self, case: Case, logits: Path) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"case": asdict(case), "logits": str(logits)}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit(f"{self.name} stopped with exit code {self.process.wait()}: its message is above")

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


def available(names: Sequence[str], peer_python: str | None, folder: Path) -> list[str]:
    """Those of the programs that can run this checkpoint here; mlx-vlm may live in another environment."""
    original = json.loads((folder / "config.json").read_text())["model_type"] == "qwen"
    if original:  # its PyTorch code comes with the checkpoint; no other MLX program runs it
        names = [name for name in names if name in ("qwenvl-mlx", "torch")]
    found = []
    for name in names:
        if original and name == "torch" and not any(folder.glob("modeling_*.py")):
            print("this folder brings no PyTorch code (modeling_qwen.py): torch is left out", file=sys.stderr)
        elif importlib.util.find_spec(NEEDS[name]) or (name == "mlx-vlm" and peer_python):
            found.append(name)
        else:
            print(f"{name} is not installed here: left out", file=sys.stderr)
    return found


@contextlib.contextmanager
def _workers(
    names: Sequence[str], folder: Path, options: Sequence[str], peer_python: str | None, cores: int
) -> Iterator[list[Worker]]:
    workers: list[Worker] = []
    try:
        for name in names:
            python = peer_python if name == "mlx-vlm" and peer_python else sys.executable
            workers.append(Worker(name, folder, options, python, cores))
        yield workers
    finally:
        for worker in workers:
            worker.close()


def compare(
    folder: Path,
    *,
    programs: Sequence[str],
    dtype: str = "float32",
    clock: str = "wall",
    cores: int,
    rounds: int = 3,
    cases: Sequence[Case] = CASES,
    peer_python: str | None = None,
) -> dict[str, Any]:
    """Run every case in every program ``rounds`` times, in turn, after one warm-up.

    ``cores``: of the processor, for each program; only one program computes at a time.
    """
    results: list[Result] = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        _workers(programs, folder, [dtype, clock], peer_python, cores) as workers,
    ):
        for case in cases:
            able = [worker for worker in workers if case.picture is None or worker.name not in BLIND]
            rows = [Result(worker.name, case.name, batch=case.batch) for worker in able]
            for turn in range(rounds + 1):
                for worker, row in zip(able, rows, strict=True):
                    answer = worker.run(case, Path(scratch) / f"{worker.name}.npy")
                    row.peak, row.vision_bytes = int(answer["peak"]), int(answer.get("vision bytes", 0))
                    if turn:  # the first round warms up
                        for part in PARTS:
                            row.samples[part].append(answer[part])
            first = np.load(Path(scratch) / f"{able[0].name}.npy")
            for row in rows:
                row.difference = float(np.abs(np.load(Path(scratch) / f"{row.program}.npy") - first).max())
            results += rows
        loads = {worker.name: worker.loaded for worker in workers}
    return {
        "device": describe(),
        "dtype": dtype,
        "clock": clock,
        "cores": cores,
        "model": folder.name,
        "loads": loads,
        "results": [asdict(result) for result in results],
    }


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: medians, and ours as a ratio to each other program (below 1: ours is faster)."""
    lines = [
        *_loads(report),
        "| case | program | preprocess s | vision s | prefill s | first token s | decode tokens/s "
        "| vision GB | peak GB | logits differ by |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = [Result(**row) for row in report["results"]]
    for row in rows:
        ours = next(other for other in rows if other.case == row.case and other.program == "qwenvl-mlx")
        cells = [
            f"{row.median(part):.3f}{_ratio(ours, row, part)}" if row.median(part) else "–"
            for part in PARTS[:-1]
        ]
        speed = f"{row.batch / row.median('decode'):.1f}{_ratio(ours, row, 'decode')}"
        vision = f"{row.vision_bytes / 1e9:.2f}" if row.vision_bytes else "–"
        numbers = f"{vision} | {row.peak / 1e9:.2f} | {row.difference:.1e}"
        lines.append(f"| {row.case} | {row.program} | {' | '.join(cells)} | {speed} | {numbers} |")
    return "\n".join(lines)


def _loads(report: dict[str, Any]) -> list[str]:
    lines = ["| program | runs on | load s | peak GB after load |", "|---|---|---|---|"]
    for name, loaded in report["loads"].items():
        lines.append(f"| {name} | {loaded['device']} | {loaded['load']:.2f} | {loaded['peak'] / 1e9:.2f} |")
    return [*lines, ""]


def _ratio(ours: Result, other: Result, part: str) -> str:
    if ours is other or not other.median(part):
        return ""
    pairs = [a / b for a, b in zip(ours.samples[part], other.samples[part], strict=True)]
    return f" (ours ×{statistics.median(pairs):.2f})"
