"""Attention of the decoders: grouped queries, rotary positions, an optional norm of queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qwenvl_mlx.layers.cache import Cache
from qwenvl_mlx.layers.fused import attend_cached
from qwenvl_mlx.layers.linear import join, join_children, joinable, map_rows, project
from qwenvl_mlx.layers.mlx_lm import leaf
from qwenvl_mlx.layers.norm import RMSNorm
from qwenvl_mlx.layers.rotary import Angles
from qwenvl_mlx.layers.shard import Group, part_of, split_heads, split_inputs, split_outputs

mlx_lm = leaf("models.base")

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, eq=False)
class Pass:
    """What all layers share in one forward pass.

    ``angles``: of the tokens' positions. ``mask``: for attention; "causal", bool ``[B, 1, L, S]``, or None.
    ``present``: bool ``[B, L]``, False where a row of a batch is padding; None when no row is padded.
    """

    angles: Angles
    mask: mx.array | str | None
    present: mx.array | None = None

    @classmethod
    def over(cls, hidden: mx.array, angles: Angles, cache: Cache | None) -> Pass:
        """``hidden``: ``[B, L, d]``, the tokens that follow what is cached."""
        length = hidden.shape[1]
        if cache is None:
            return cls(angles, "causal" if length > 1 else None)
        recurrent = [layer for layer in cache if not hasattr(layer, "offset")]
        present = recurrent[0].make_mask(length) if recurrent else None
        return cls(angles, mlx_lm.create_attention_mask(hidden, cache.attention), present)


class Attention(nn.Module):
    """``bias``: of the query, key and value products; ``norm_eps``: None where queries and keys have no norm."""

    def __init__(
        self,
        hidden: int,
        heads: int,
        kv_heads: int,
        size: int,
        *,
        bias: bool = False,
        output_bias: bool = False,
        norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, size
        self.scale = size**-0.5
        self.q_proj = nn.Linear(hidden, heads * size, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_heads * size, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_heads * size, bias=bias)
        self.o_proj = nn.Linear(heads * size, hidden, bias=output_bias)
        if norm_eps is not None:
            self.q_norm = RMSNorm(size, norm_eps)
            self.k_norm = RMSNorm(size, norm_eps)

    @property
    def output(self) -> nn.Module:
        """The last product, which the decoder layer adds to its stream."""
        return self.o_proj

    def shard(self, group: Group) -> None:
        """Keep this machine's heads."""
        self.heads = part_of(self.heads, group, "attention heads")
        split_outputs(self.q_proj, group)
        self.kv_heads = split_heads([self.k_proj, self.v_proj], self.kv_heads, self.size, group)
        self.o_proj = split_inputs(self.o_proj, group)

    def prepare(self) -> None:
        """Join the three products into one, and the norms' weights of all heads."""
        join_children(self, PROJECTIONS, "qkv_proj")
        if "q_norm" in self:
            self._head_weights = self._stack_weights()
            mx.eval(self._head_weights)

    def _stack_weights(self) -> mx.array:
        return mx.stack([self.q_norm.weight] * self.heads + [self.k_norm.weight] * self.kv_heads)

    def __call__(self, x: mx.array, shared: Pass, cache: Any | None) -> mx.array:
        """``[B, L, hidden]`` -> heads side by side ``[B, L, heads * size]``, before ``o_proj``."""
        return self.attend(project(self, PROJECTIONS, "qkv_proj", x), shared, cache)

    def attend(self, qkv: mx.array, shared: Pass, cache: Any | None) -> mx.array:
        """``qkv``: ``[B, L, (heads + 2 kv_heads) * size]``, in this order."""
        batch, length, _ = qkv.shape
        qkv = qkv.reshape(batch, length, -1, self.size)
        v = qkv[:, :, -self.kv_heads :]
        if "q_norm" in self:  # values too, for nothing: a kernel that gets a part of each row copies it first
            qkv = mx.fast.rms_norm(qkv, None, self.q_norm.eps)
        qk = self._turn(qkv[:, :, : -self.kv_heads], shared.angles).transpose(0, 2, 1, 3)
        q, k = mx.split(qk, [self.heads], axis=1)  # [B, heads, L, size]
        v = v.transpose(0, 2, 1, 3)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        out = attend_cached(q, k, v, cache, scale=self.scale, mask=shared.mask)
        return out.transpose(0, 2, 1, 3).reshape(batch, length, -1)

    def _turn(self, qk: mx.array, angles: Angles) -> mx.array:
        """The norm's weights and the rotation, of queries and keys together: ``[B, L, heads + kv_heads, size]``."""
        if "q_norm" not in self:
            return angles.turn(qk)
        return angles.turn(qk, self._head_weights if "_head_weights" in self else self._stack_weights())


@partial(mx.compile, shapeless=True)
def _gate(x: mx.array, gate: mx.array) -> mx.array:
    return x * mx.sigmoid(gate)


class GatedAttention(Attention):
    """Attention whose output is gated: ``q_proj`` gives each head a query and a gate, side by side (Qwen3.5)."""

    def __init__(
        self, hidden: int, heads: int, kv_heads: int, size: int, *, bias: bool, norm_eps: float
    ) -> None:
        super().__init__(hidden, heads, kv_heads, size, bias=bias, output_bias=bias, norm_eps=norm_eps)
        self.q_proj = nn.Linear(hidden, 2 * heads * size, bias=bias)

    def prepare(self) -> None:
        """Join the products, with all gates before all queries."""
        if "qkv_proj" not in self and joinable(*(self[name] for name in PROJECTIONS)):
            rows = mx.arange(2 * self.heads * self.size).reshape(self.heads, 2, self.size)
            order = rows[:, ::-1].swapaxes(0, 1).flatten()
            q_proj = self.q_proj
            map_rows(q_proj, lambda name: q_proj[name][order])
            self.qkv_proj = join(*(self.pop(name) for name in PROJECTIONS))
        super().prepare()

    def __call__(self, x: mx.array, shared: Pass, cache: Any | None) -> mx.array:
        gate, qkv = self._gate_and_heads(x)
        return _gate(self.attend(qkv, shared, cache), gate)

    def _gate_and_heads(self, x: mx.array) -> tuple[mx.array, mx.array]:
        if "qkv_proj" in self:
            gate, qkv = mx.split(self.qkv_proj(x), [self.heads * self.size], axis=-1)
            return gate, qkv
        pairs = mx.unflatten(self.q_proj(x), -1, (self.heads, 2, self.size))
        query, gate = (pairs[..., half, :].flatten(-2) for half in (0, 1))
        return gate, mx.concatenate([query, self.k_proj(x), self.v_proj(x)], axis=-1)
