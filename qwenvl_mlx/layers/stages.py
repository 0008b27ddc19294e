"""Work that may pause: a generator that yields what it has so far, lazily, and returns its result."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

import mlx.core as mx

T = TypeVar("T")
Stages = Generator[mx.array, None, T]


def finish(stages: Stages[T]) -> T:
    """The result of work that nobody wants to interrupt.

    On a CPU each stage is computed at once: MLX makes room for all that it is told to compute, long before it does.
    """
    while True:
        try:
            stage = next(stages)
            if mx.default_device() == mx.cpu:
                mx.eval(stage)
        except StopIteration as end:
            result: T = end.value
            return result
