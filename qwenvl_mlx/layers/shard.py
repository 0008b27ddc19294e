"""Tensor parallelism: cut linear layers over the machines of a group, each part of a layer on one of them.

The cores of one machine may stand in the machines' place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_inplace, shard_linear

from qwenvl_mlx.errors import ConfigError
from qwenvl_mlx.layers.linear import map_rows


@dataclass(frozen=True)
class Core:
    """A core of this machine in a machine's place. Sums over cores are left to whoever asked for them."""

    index: int
    count: int

    def rank(self) -> int:
        return self.index

    def size(self) -> int:
        return self.count


Group = mx.distributed.Group
Members = Group | Core


def split_outputs(layer: nn.Module, group: Members, *, segments: int = 1) -> None:
    """Keep this machine's part of the outputs. ``segments``: layers that are joined in this one, cut one by one."""
    part_of(layer.weight.shape[-2] // segments, group, "outputs")
    _cut(layer, "all-to-sharded", group, segments)
    mx.eval(layer.parameters())  # now: the whole model never stands in one machine's memory


def split_inputs(layer: nn.Module, group: Members) -> Any:
    """A layer that takes this machine's part of the inputs and gives the sum over all machines; a core's part alone."""
    if isinstance(group, Core):
        split_inputs_unsummed(layer, group)
        if group.index:
            layer.pop("bias", None)
        return layer
    _check_groups(layer, group)
    part: nn.Module = shard_linear(layer, "sharded-to-all", group=group)
    mx.eval(part.parameters())
    return part


def split_inputs_unsummed(layer: nn.Module, group: Members) -> None:
    """Keep this machine's part of the inputs; the caller sums."""
    _check_groups(layer, group)
    _cut(layer, "sharded-to-all", group)
    mx.eval(layer.parameters())


def total(x: mx.array, group: Members | None) -> mx.array:
    """The sum over all machines; a core's part is left as it is."""
    return x if group is None or isinstance(group, Core) else mx.distributed.all_sum(x, group=group)


def _cut(layer: nn.Module, how: str, group: Members, segments: int = 1) -> None:
    shard_inplace(layer, how, segments=segments, group=group)  # type: ignore[arg-type]  # asks for rank and size


def split_heads(layers: list[nn.Module], heads: int, size: int, group: Members) -> int:
    """Keep this machine's heads of ``size`` outputs each; returns their number.

    With fewer heads than machines, neighbours hold the same one; cores don't, as they share their memory.
    """
    machines = group.size()
    if heads < machines and machines % heads == 0 and not isinstance(group, Core):
        first = group.rank() * heads // machines * size
        for layer in layers:
            _keep_rows(layer, first, first + size)
        return 1
    for layer in layers:
        split_outputs(layer, group)
    return part_of(heads, group, "heads")


def part_of(count: int, group: Members, what: str) -> int:
    """This machine's number of ``what``; ``ConfigError`` where they can't be dealt out evenly."""
    if count % group.size():
        raise ConfigError(
            f"{count} {what} can't be cut over {group.size()} machines: take a divisor of {count}"
        )
    return count // group.size()


def _keep_rows(layer: nn.Module, begin: int, end: int) -> None:
    map_rows(layer, lambda name: mx.contiguous(layer[name][begin:end]))


def _check_groups(layer: nn.Module, group: Members) -> None:
    """Groups of quantised weights must not be cut through."""
    if "scales" in layer and layer.scales.shape[-1] % group.size():
        raise ConfigError(
            f"{layer.scales.shape[-1]} groups of quantised weights can't be cut over {group.size()} machines: "
            "quantise with a smaller --q-group-size"
        )
