"""Feed-forward layers: gated, and mixtures of gated experts."""

from __future__ import annotations

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qwenvl_mlx.layers.exponential import exp_pays, swish_times
from qwenvl_mlx.layers.linear import apply, join_children, joinable, project
from qwenvl_mlx.layers.mlx_lm import leaf
from qwenvl_mlx.layers.shard import Members, split_inputs, split_inputs_unsummed, split_outputs, total

switch = leaf("models.switch_layers")

GATE_UP = ("gate_proj", "up_proj")


@partial(mx.compile, shapeless=True)
def _gated(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


def gated(gate: mx.array, up: mx.array) -> mx.array:
    """``silu(gate) * up``."""
    return swish_times(gate, up) if exp_pays(gate) else _gated(gate, up)


def swiglu(gate_up: mx.array) -> mx.array:
    """``gated`` of the two halves of the last axis."""
    return gated(*mx.split(gate_up, 2, axis=-1))


class MLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, hidden: int, inner: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def shard(self, group: Members) -> None:
        """Keep this machine's part of the inner width."""
        for name in GATE_UP:
            split_outputs(self[name], group)
        self.down_proj = split_inputs(self.down_proj, group)

    def prepare(self) -> None:
        """Join gate and up into one product."""
        join_children(self, GATE_UP, "gate_up_proj")

    def inner(self, x: mx.array) -> mx.array:
        """What ``down_proj`` takes: kept apart so that it can be added to the residual in one kernel."""
        return swiglu(project(self, GATE_UP, "gate_up_proj", x))

    def __call__(self, x: mx.array) -> mx.array:
        return apply(self.down_proj, self.inner(x))


class Halves(nn.Module):
    """``swiglu`` as a layer: the activation of experts whose gate and up are joined."""

    def __call__(self, gate_up: mx.array) -> mx.array:
        return swiglu(gate_up)


class Experts(nn.Module):
    """A router and its experts: the ``top`` best of ``experts``, weighted by their renormalised probabilities."""

    def __init__(self, hidden: int, inner: int, experts: int, top: int) -> None:
        super().__init__()
        self.top = top
        self.group: Members | None = None
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.switch_mlp: Any = switch.SwitchGLU(hidden, inner, experts)

    def shard(self, group: Members) -> None:
        """Keep this machine's part of every expert's inner width."""
        for name in GATE_UP:
            split_outputs(self.switch_mlp[name], group)
        split_inputs_unsummed(self.switch_mlp.down_proj, group)
        self.group = group

    def prepare(self) -> None:
        """Join gate and up of all experts: with them SwitchGLU becomes mlx-lm's two-layer SwitchMLP."""
        split = self.switch_mlp
        if not isinstance(split, switch.SwitchGLU) or not joinable(split.gate_proj, split.up_proj):
            return
        joined = switch.SwitchMLP(1, 1, 1, activation=Halves())
        joined.fc1, joined.fc2 = _join_outputs(split.gate_proj, split.up_proj), split.down_proj
        if mx.default_device() == mx.cpu:
            joined.set_dtype(mx.float32)  # MLX's gather_mm has no other type on CPUs
        self.switch_mlp = joined

    def __call__(self, x: mx.array) -> mx.array:
        logits = self.gate(x)
        best = mx.argpartition(logits, kth=-self.top, axis=-1)[..., -self.top :]
        # a softmax over the best alone is the softmax over all, renormalised
        weights = mx.softmax(mx.take_along_axis(logits, best, axis=-1), axis=-1, precise=True)
        outputs = self._experts(x, best)  # [B, L, top, hidden]
        mixed: mx.array = (weights[..., None, :].astype(x.dtype) @ outputs).squeeze(-2)
        return total(mixed, self.group)

    def _experts(self, x: mx.array, best: mx.array) -> mx.array:
        plain = "fc1" in self.switch_mlp and "scales" not in self.switch_mlp.fc1
        wide = x.astype(self.switch_mlp.fc1.weight.dtype) if plain else x
        outputs: mx.array = self.switch_mlp(wide, best).astype(x.dtype)
        return outputs


@partial(mx.compile, shapeless=True)
def _add_gated(x: mx.array, gate: mx.array, shared: mx.array) -> mx.array:
    return x + mx.sigmoid(gate) * shared


class SharedExperts(Experts):
    """Experts, and one more that sees every token, behind a gate of its own (Qwen3.5 MoE)."""

    def __init__(self, hidden: int, inner: int, experts: int, top: int, shared: int) -> None:
        super().__init__(hidden, inner, experts, top)
        self.shared_expert = MLP(hidden, shared)
        self.shared_expert_gate = nn.Linear(hidden, 1, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return _add_gated(super().__call__(x), apply(self.shared_expert_gate, x), self.shared_expert(x))


def _join_outputs(first: nn.Module, second: nn.Module) -> nn.Module:
    """Experts' weights ``[experts, outputs, inputs]`` one above the other."""
    names = [name for name in ("weight", "scales", "biases") if first.get(name) is not None]
    joined = {name: mx.concatenate([first[name], second[name]], axis=1) for name in names}
    mx.eval(joined)
    first.update(joined, strict=False)
    return first
