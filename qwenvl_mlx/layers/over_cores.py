"""A decoder over the cores of a processor, as one is cut over machines: heads and feed-forward width, each with its own
keys and values. Cores meet twice in a layer, to add what they have; every meeting costs a tenth of a millisecond.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from qwenvl_mlx.errors import ConfigError
from qwenvl_mlx.layers.cores import cores, on
from qwenvl_mlx.layers.linear import CUT
from qwenvl_mlx.layers.shard import Core

WORTH = 1 << 22  # bytes of weights that are worth a second core: a third of a millisecond for a token


class Split(nn.Module):
    """Stands in the place of a module whose ``parts`` are on a core each, and sum up to it."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = list(parts)


def parts_of(module: nn.Module) -> Sequence[nn.Module]:
    """One for each core that it is split over."""
    return module.parts if isinstance(module, Split) else (module,)


def split(module: nn.Module) -> nn.Module:
    """``module``, or what stands in its place: over all cores, or as many as its heads and widths can be cut for.

    To be called before ``prepare``. Left whole is what is small, has no ``shard``, or holds layers that do more than
    multiply.
    """
    matrices = [layer for layer in module.modules() if "weight" in layer and layer.weight.ndim == 2]
    plain = all(type(layer) in CUT for layer in matrices)
    size = sum(array.nbytes for array in dict(tree_flatten(module.parameters())).values())
    if not hasattr(module, "shard") or not plain or size < WORTH:
        return module
    for count in range(cores(), 1, -1):
        try:
            return Split([_part(module, Core(index, count)) for index in range(count)])
        except ConfigError:  # can't be cut so
            continue
    return module


def add_parts(
    residual: mx.array, module: nn.Module, update: Callable[[nn.Module, int, mx.array | None], mx.array]
) -> mx.array:
    """``residual`` and the sum of ``update(part, core, residual)``, which adds the residual where there is one."""
    parts = parts_of(module)
    if len(parts) == 1:
        return update(parts[0], 0, residual)
    sums = []
    for core, part in enumerate(parts):
        with on(core):
            sums.append(update(part, core, None if core else residual))
    return sum(sums[1:], sums[0])


def _part(module: nn.Module, core: Core) -> nn.Module:
    part = _twin(module)
    for one in part.modules():
        if hasattr(one, "shard"):
            one.shard(core)
    return part


def _twin(module: nn.Module) -> nn.Module:
    """Another module of the same arrays."""
    twin = copy.copy(module)
    for name, child in module.items():
        if isinstance(child, nn.Module):
            twin[name] = _twin(child)
    return twin
