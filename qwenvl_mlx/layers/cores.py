"""The cores of a processor side by side: MLX gives each stream of its CPU backend a thread.

A GPU needs none of this. Nor does macOS, whose library of matrix products takes all cores by itself.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import mlx.core as mx

MOST = 4  # cores; what each computes stands in memory
# Rows that are worth a core of their own: of half as many a product takes more than half the time.
ENOUGH = 64

# What libraries of matrix products tell of the threads that they take by themselves; the one in MLX's wheel takes one.
THREADS = ("bli_thread_get_num_threads", "openblas_get_num_threads")

_within = threading.local()
_alone = threading.Event()


def cores() -> int:
    """Over how many cores work can be dealt out here: 1 on a GPU, and in what is one core's part already."""
    if mx.default_device() == mx.gpu or _alone.is_set() or getattr(_within, "part", False):
        return 1
    return 1 + len(_streams())


def stay_alone() -> None:
    """Deal out nothing that is not dealt out yet: where machines share a model, their sums need one order on all."""
    _alone.set()


@contextmanager
def on(core: int) -> Iterator[None]:
    """What is computed within is one core's part: 0 is the core that computes everything else too."""
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


class Turns:
    """Parts of one thing, dealt out over the cores. A core begins one when it has ended its last, so that few are in
    memory at once. Whoever takes the parts joins them: what is kept must not wait for another core's stream.
    """

    def __init__(self) -> None:
        self._last: list[mx.array | None] = [None] * cores()
        self._turn = itertools.cycle(range(len(self._last)))

    def __call__(self, part: Callable[..., mx.array], x: mx.array, *others: mx.array) -> mx.array:
        """``part(x, *others)`` on the next core."""
        core = next(self._turn)
        last = self._last[core]
        with on(core):
            # depends() runs on the stream that made its first input: here this core's
            result = part(x if last is None else mx.depends([last, x], [last])[1], *others)
        self._last[core] = result
        return result


def by_rows(function: Callable[..., mx.array], *arrays: mx.array, most: int) -> mx.array:
    """``function(*arrays)``, which makes a row of each row ``[n, …]``; on a CPU in parts, of ``most`` rows at most."""
    count, several = len(arrays[0]), cores()
    parts = 1 if mx.default_device() == mx.gpu else -(-count // most)
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


@cache
def _streams() -> tuple[mx.ThreadLocalStream, ...]:
    """One for each core but the first, which has the stream that is used anyway."""
    return tuple(mx.new_thread_local_stream(mx.default_device()) for _ in range(_free() - 1))


def _free() -> int:
    """Cores that this process may take, and that products leave idle."""
    if not hasattr(os, "sched_getaffinity"):  # macOS
        return 1
    library = ctypes.CDLL(None)
    taken = [int(getattr(library, name)()) for name in THREADS if hasattr(library, name)]
    return min(len(os.sched_getaffinity(0)) // max([1, *taken]), MOST)
