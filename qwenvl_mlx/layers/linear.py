"""Linear layers in the layouts that cost the fewest kernels, plain or quantised alike."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from qwenvl_mlx.layers.cores import cores, evenly, on

# Arrays of a linear layer whose first axis is the output: a change to that axis touches all of them alike.
ROWS = ("weight", "scales", "biases", "bias")
# Rows of a product that a CPU computes sooner with the weights in front: with BLIS's kernels for AVX-512 up to 200, by
# a quarter at 64; with those for AMD's Zen up to 511, in half the time from 200 on.
WEIGHTS_FIRST = range(16, 512)
CUT = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)  # that add nothing over machines
LARGE = 1 << 20  # multiplications of a product that are worth a second core: a tenth of a millisecond


def join(first: nn.Module, *others: nn.Module) -> nn.Module:
    """One linear layer that gives the outputs of several side by side: bit-identical, also when quantised.

    The layers must agree in input size, bias and quantisation. ``first`` is changed in place, layer by layer so
    that a model is never held twice in memory.
    """
    return map_rows(first, lambda name: mx.concatenate([first[name], *(layer[name] for layer in others)]))


def joinable(*layers: nn.Module) -> bool:
    """Whether ``join`` may be used: all plain, or all quantised in the same way (a recipe may mix bits)."""
    kinds = {
        (type(layer), *(getattr(layer, key, None) for key in ("bits", "group_size", "mode")), "bias" in layer)
        for layer in layers
    }
    return len(kinds) == 1


def pad_heads(layer: nn.Module, size: int, padded: int) -> None:
    """Give every run of ``size`` outputs (an attention head) trailing zeros up to ``padded`` outputs."""

    def pad(name: str) -> mx.array:
        rows = layer[name].reshape(-1, size, *layer[name].shape[1:])  # [heads, size, …]
        widths = [(0, 0), (0, padded - size)] + [(0, 0)] * (rows.ndim - 2)
        return mx.pad(rows, widths).reshape(-1, *layer[name].shape[1:])

    map_rows(layer, pad)


def map_rows(layer: nn.Module, change: Callable[[str], mx.array]) -> nn.Module:
    """Replace each per-output array of ``layer`` by ``change(name)``, and compute it at once."""
    changed = {name: change(name) for name in ROWS if name in layer}
    mx.eval(changed)
    layer.update(changed, strict=False)
    return layer


def keep_view(layer: nn.Module) -> None:
    """Make once what products take of a plain layer: for a token's graph every view costs the host time."""
    if type(layer) is nn.Linear:
        layer._view = (layer.weight, layer.weight.T)
        mx.eval(layer._view)


def _columns(layer: nn.Module) -> mx.array:
    """Weights ``[inputs, outputs]``: the view that was kept, while it is one of these weights."""
    weight, view = layer.get("_view", (None, None))
    columns: mx.array = view if weight is layer.weight else layer.weight.T
    return columns


def apply(layer: nn.Module, x: mx.array) -> mx.array:
    """``layer(x)`` of ``[L, inputs]`` or ``[B, L, inputs]`` in the type of ``x``, all rows of a batch in one product.

    MLX's sum with a bias goes through a batch row by row on CPUs, and reads the weights anew for each. Its quantised
    products have the type of the scales where that is wider: exact scales of AWQ are float32 in a float16 model.
    """
    flat = x if x.ndim < 3 or len(x) == 1 else x.flatten(0, 1)
    # on a GPU the host's time for a token counts: no closure there
    several = cores() > 1
    out = by_outputs(lambda part, _: _product(part, flat), layer, flat) if several else _product(layer, flat)
    if "scales" in layer and out.dtype != x.dtype:
        out = out.astype(x.dtype)
    return out if flat is x else mx.unflatten(out, 0, x.shape[:2])


def add_linear(residual: mx.array | None, layer: nn.Module, x: mx.array) -> mx.array:
    """``residual + layer(x)``, in one kernel where the layer is plain and has no bias. Rows as in ``apply``.

    Without a residual it is ``apply``.
    """
    if residual is None:
        return apply(layer, x)
    if not isinstance(layer, nn.Linear) or "bias" in layer or _few_rows(layer, x):
        return residual + apply(layer, x)
    if x.ndim < 3 or len(x) == 1:
        if cores() > 1:
            return by_outputs(lambda part, some: mx.addmm(residual[..., some], x, _columns(part)), layer, x)
        return mx.addmm(residual, x, _columns(layer))
    added = mx.addmm(residual.flatten(0, 1), x.flatten(0, 1), _columns(layer))
    return mx.unflatten(added, 0, x.shape[:2])


def by_outputs(function: Callable[[nn.Module, slice], mx.array], layer: nn.Module, x: mx.array) -> mx.array:
    """``function(layer, all outputs)``, a product with ``x``; on a CPU some outputs on each core where it is large."""
    outputs, count = len(layer.weight), cores()
    if count == 1 or type(layer) not in CUT or outputs < count or outputs * x.size < LARGE:
        return function(layer, slice(None))
    parts = []
    for core, ends in enumerate(itertools.pairwise([0, *evenly(outputs, count), outputs])):
        with on(core):
            parts.append(function(_part(layer, slice(*ends)), slice(*ends)))
    return mx.concatenate(parts, axis=-1)


def _part(layer: nn.Module, rows: slice) -> nn.Module:
    """A layer that gives some of the outputs."""
    part = copy.copy(layer)
    for name in ROWS:
        if name in layer:
            part[name] = layer[name][rows]
    return part


def _product(layer: nn.Module, x: mx.array) -> mx.array:
    if _few_rows(layer, x):
        return _weights_first(layer, x)
    if type(layer) is nn.Linear:
        return mx.addmm(layer.bias, x, _columns(layer)) if "bias" in layer else x @ _columns(layer)
    out: mx.array = layer(x)
    return out


def _few_rows(layer: nn.Module, x: mx.array) -> bool:
    rows = x.size // x.shape[-1]
    plain = type(layer) is nn.Linear and layer.weight.dtype == x.dtype == mx.float32
    return plain and rows in WEIGHTS_FIRST and mx.default_device() == mx.cpu


def _weights_first(layer: nn.Module, x: mx.array) -> mx.array:
    """``layer(x)`` that lies in memory output by output."""
    rows = x.swapaxes(-1, -2)
    out = mx.addmm(layer.bias[:, None], layer.weight, rows) if "bias" in layer else layer.weight @ rows
    return out.swapaxes(-1, -2)


def join_children(module: nn.Module, names: Sequence[str], joined: str) -> None:
    """Replace the linear layers ``names`` of ``module`` by one, ``joined``, where their kinds agree."""
    if joined in module or not joinable(*(module[name] for name in names)):
        return
    module[joined] = join(*(module.pop(name) for name in names))


def project(module: nn.Module, names: Sequence[str], joined: str, x: mx.array) -> mx.array:
    """Outputs of the linear layers ``names`` side by side, whether they were joined or not."""
    if joined in module:
        return apply(module[joined], x)
    return mx.concatenate([apply(module[name], x) for name in names], axis=-1)
