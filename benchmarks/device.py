"""What a figure was measured on, and what that device allows at most."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from typing import Any

import mlx.core as mx


def describe() -> dict[str, str]:
    """Device, chip, operating system and library versions: printed with every result."""
    return {
        "device": str(mx.default_device()),
        "chip": _chip(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "mlx": version("mlx"),
    }


def _chip() -> str:
    if platform.system() == "Darwin":
        done = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        return done.stdout.strip() or platform.machine()
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _best(run: Any, repeats: int = 5) -> float:
    times: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def bandwidth() -> float:
    """Bytes a second of a matrix-vector product over 256 MB of float32 weights, on all cores: what decoding does."""
    weights, vector = mx.random.normal((8192, 8192)), mx.random.normal((1, 8192))
    return weights.nbytes / _product(vector, weights)


def matmul_rate(dtype: mx.Dtype = mx.float32, size: int = 2048) -> float:
    """Floating-point operations a second of a square product, on all cores."""
    a, b = (mx.random.normal((size, size)).astype(dtype) for _ in "ab")
    return 2 * size**3 / _product(a, b)


def _product(x: mx.array, weights: mx.array) -> float:
    """Seconds of ``x @ weights.T``, some outputs on each core."""
    from qwenvl_mlx.layers.cores import Turns, cores, evenly

    parts = mx.split(weights, evenly(len(weights), cores()))
    mx.eval(x, parts)

    def run() -> None:
        turns = Turns()
        mx.eval([turns(lambda x, part=part: x @ part.T, x) for part in parts])

    return _best(run)


def reset_peak() -> None:
    """Let ``peak_bytes`` begin anew; only Linux can."""
    if sys.platform == "linux":
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")


def peak_bytes() -> int:
    """The most memory that this process has held, since ``reset_peak`` where that works."""
    if sys.platform == "linux":
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
