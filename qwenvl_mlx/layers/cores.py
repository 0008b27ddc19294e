"""The cores of a processor side by side: MLX gives each stream of its CPU backend a thread.

A GPU needs none of this. Nor does macOS, whose library of matrix products takes all cores by itself.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import mlx.core as mx

MOST = 4  # cores; what each computes stands in memory
ENOUGH = 64  # rows for each core that are worth cutting: half the time of twice as many

# How many threads a product takes by itself: the first that is set; BLIS and the one in MLX's wheel else take one.
BLAS_THREADS = ("BLIS_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")

_within = threading.local()


def cores() -> int:
    """Over how many cores work can be dealt out here: 1 on a GPU, and in what is one core's part already."""
    if mx.default_device() == mx.gpu or getattr(_within, "part", False):
        return 1
    return 1 + len(_streams())


class Turns:
    """Parts of one thing, dealt out over the cores. A core begins with none before it has ended the last, so that few
    are in memory at once.
    """

    def __init__(self) -> None:
        self._last: list[mx.array | None] = [None] * cores()
        self._turn = itertools.cycle(range(len(self._last)))

    def __call__(self, part: Callable[..., mx.array], x: mx.array, *others: mx.array) -> mx.array:
        """``part(x, *others)`` on the next core."""
        core = next(self._turn)
        last = self._last[core]
        with _on(core):
            # depends() runs on the stream that made its first input: here this core's
            result = part(x if last is None else mx.depends([last, x], [last])[1], *others)
        self._last[core] = result
        return result


def by_rows(function: Callable[..., mx.array], *arrays: mx.array, most: int | None = None) -> mx.array:
    """``function(*arrays)``, which makes a row of each row ``[n, …]``; on a CPU in parts, of ``most`` rows at most."""
    count, several = len(arrays[0]), cores()
    parts = 1 if most is None or mx.default_device() == mx.gpu else -(-count // most)
    if count >= ENOUGH * several:
        parts = -(-parts // several) * several
    if parts == 1:
        return function(*arrays)
    turns, cuts = Turns(), evenly(count, parts)
    cut = zip(*(mx.split(array, cuts) for array in arrays), strict=True)
    return mx.concatenate([turns(function, *rows) for rows in cut])


def evenly(count: int, parts: int) -> list[int]:
    """Where to cut ``count`` things into parts that differ by one at most."""
    return [count * part // parts for part in range(1, parts)]


@contextmanager
def _on(core: int) -> Iterator[None]:
    before = getattr(_within, "part", False)
    _within.part = True
    try:
        if core:
            with mx.stream(_streams()[core - 1]):
                yield
        else:
            yield
    finally:
        _within.part = before


@cache
def _streams() -> tuple[mx.ThreadLocalStream, ...]:
    """One for each core but the first, which has the stream that is used anyway."""
    return tuple(mx.new_thread_local_stream(mx.default_device()) for _ in range(_free() - 1))


def _free() -> int:
    """Cores that this process may take, and that products leave idle."""
    if not hasattr(os, "sched_getaffinity"):  # macOS
        return 1
    told = next((os.environ[name] for name in BLAS_THREADS if os.environ.get(name, "").isdigit()), "1")
    return min(len(os.sched_getaffinity(0)) // max(int(told), 1), MOST)
