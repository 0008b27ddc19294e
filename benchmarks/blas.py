"""A fast BLAS for MLX's CPU backend on Linux: its own takes 20 times as long. Must be known before MLX is imported."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

BLIS = Path("/usr/lib/x86_64-linux-gnu/blis-pthread/libblis.so.4")  # Debian's libblis4-pthread


def load() -> None:
    """Into this process, with one thread, unless MLX is here already."""
    if BLIS.exists() and "mlx.core" not in sys.modules:
        os.environ.update(_settings(1))
        ctypes.CDLL(str(BLIS), mode=ctypes.RTLD_GLOBAL)


def environment(program: str, cores: int) -> dict[str, str]:
    """Environment variables of a process that may take so many cores.

    PyTorch brings a fast BLAS of its own. Others need BLIS, with a thread for each core; ours deals out to the cores
    what has one thread.
    """
    threads = 1 if program == "qwenvl-mlx" else cores
    variables = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    if program == "torch" or not BLIS.exists():
        return variables
    return {**variables, "LD_PRELOAD": str(BLIS), **_settings(threads)}


def all_cores() -> int:
    """Those that this process may take."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def only(cores: int) -> Iterator[None]:
    """Hold this process, and those that it starts, to so many cores, where the system can (macOS can't)."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _settings(threads: int) -> dict[str, str]:
    """BLIS takes AVX-512 only of processors whose names it knows, and a virtual machine's has none.

    Those that have AMX have two AVX-512 units as well: large products take two thirds of the time, products of 2 to 16
    rows more than with AVX2. With two threads a vision tower took three times as long with BLIS's AVX-512 kind.
    """
    flags = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    skx, its_choice = "0", "-1"
    kind = skx if "amx_tile" in flags and threads == 1 else its_choice
    return {"BLIS_NUM_THREADS": str(threads), "BLIS_ARCH_TYPE": kind}
