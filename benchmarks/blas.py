"""A fast BLAS for MLX's CPU backend on Linux: its own takes 20 times as long. Must be known before MLX is imported."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

BLIS = Path("/usr/lib/x86_64-linux-gnu/blis-pthread/libblis.so.4")  # Debian's libblis4-pthread


def kernels() -> dict[str, str]:
    """Environment variables that make BLIS use AVX-512 where a virtual machine's processor has no telling name.

    Processors that have AMX have two AVX-512 units as well: products take two thirds of the time.
    """
    flags = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    return {"BLIS_ARCH_TYPE": "0"} if "amx_tile" in flags else {}  # its kind "skx"


def load() -> None:
    """Into this process, on one core, unless MLX is here already."""
    if BLIS.exists() and "mlx.core" not in sys.modules:
        for name, value in {"BLIS_NUM_THREADS": "1", **kernels()}.items():
            os.environ.setdefault(name, value)
        ctypes.CDLL(str(BLIS), mode=ctypes.RTLD_GLOBAL)


def preloaded(cores: int) -> dict[str, str]:
    """Environment variables of a process that is to begin with BLIS, and to have so many cores for its products."""
    if not BLIS.exists():
        return {}
    chosen = {"LD_PRELOAD": str(BLIS), **kernels()}
    return {name: os.environ.get(name, value) for name, value in chosen.items()} | {
        "BLIS_NUM_THREADS": str(cores)
    }


def on_cores(count: int) -> dict[str, str]:
    """Environment variables that hold PyTorch and NumPy to so many processor cores."""
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(count))
