"""Attention of the decoders: grouped queries, rotary positions, an optional norm of queries and keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qwenvl_mlx.layers.cache import Cache, FixedKV, kv
from qwenvl_mlx.layers.fused import attend_cached, last_query
from qwenvl_mlx.layers.linear import apply, join, join_children, joinable, map_rows, project
from qwenvl_mlx.layers.mlx_lm import leaf
from qwenvl_mlx.layers.norm import RMSNorm
from qwenvl_mlx.layers.rotary import Angles, HeadWeights
from qwenvl_mlx.layers.shard import Members, part_of, split_heads, split_inputs, split_outputs

mlx_lm = leaf("models.base")

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, eq=False)
class Pass:
    """What all layers share in one forward pass.

    ``angles``: of the tokens' positions. ``mask``: for attention; "causal", bool ``[B, 1, L, S]``, or None.
    ``present``: bool ``[B, L]``, False where a row of a batch is padding; None when no row is padded.
    ``last_only``: of a layer nothing is wanted but what it makes of the last token.
    """

    angles: Angles
    mask: mx.array | str | None
    present: mx.array | None = None
    last_only: bool = False

    @classmethod
    def over(cls, hidden: mx.array, angles: Angles, cache: Cache | None) -> Pass:
        """``hidden``: ``[B, L, d]``, the tokens that follow what is cached."""
        length = hidden.shape[1]
        if cache is None:
            return cls(angles, "causal" if length > 1 else None)
        recurrent = [layer for layer in cache if not hasattr(layer, "offset")]
        present = recurrent[0].make_mask(length) if recurrent else None
        return cls(angles, mlx_lm.create_attention_mask(hidden, cache.attention), present)

    def of_last(self) -> Pass:
        """For a layer whose output for all tokens but the last is not used."""
        return replace(self, mask=last_query(self.mask), last_only=True)


class Attention(nn.Module):
    """``bias``: of the query, key and value products; ``norm_eps``: None where queries and keys have no norm.

    ``rotated``: how many numbers of a head turn, if not all.
    """

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
        rotated: int | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size, self.rotated = heads, kv_heads, size, rotated or size
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

    def new_cache(self) -> Any:
        """An empty cache for one sequence."""
        return kv.KVCache()

    def shard(self, group: Members) -> None:
        """Keep this machine's heads."""
        self.heads = part_of(self.heads, group, "attention heads")
        split_outputs(self.q_proj, group)
        self.kv_heads = split_heads([self.k_proj, self.v_proj], self.kv_heads, self.size, group)
        self.o_proj = split_inputs(self.o_proj, group)

    def prepare(self) -> None:
        """Join the three products into one, and the norms' weights of all heads."""
        join_children(self, PROJECTIONS, "qkv_proj")
        self._values, self._weights = self._constants()
        mx.eval(self._values, self._weights.views if self._weights else ())

    def _constants(self) -> tuple[mx.array, HeadWeights | None]:
        """Which of all heads are values, bool ``[heads + 2 kv_heads, 1, 1]``; and the weights of their norms."""
        turning = self.heads + self.kv_heads
        values = mx.arange(turning + self.kv_heads).reshape(-1, 1, 1) >= turning
        if "q_norm" not in self:
            return values, None
        weights = [self.q_norm.weight] * self.heads + [self.k_norm.weight] * self.kv_heads
        weights += [mx.ones_like(self.k_norm.weight)] * self.kv_heads
        return values, HeadWeights.of(mx.stack(weights), self.rotated)

    def __call__(self, x: mx.array, shared: Pass, cache: Any | None) -> mx.array:
        """``[B, L, hidden]`` or ``[B, hidden]`` -> heads side by side ``[…, heads * size]``, before ``o_proj``."""
        return self.attend(project(self, PROJECTIONS, "qkv_proj", x), shared, cache)

    def attend(self, qkv: mx.array, shared: Pass, cache: Any | None) -> mx.array:
        """``qkv``: ``[…, (heads + 2 kv_heads) * size]``, in this order."""
        batch, *lengths = qkv.shape[:-1]
        length = lengths[0] if lengths else 1
        shape = (batch, length, self.heads + 2 * self.kv_heads, self.size)
        # values too, for nothing: a kernel that gets a part of each row copies it first
        normed = mx.fast.rms_norm(qkv.reshape(shape), None, self.q_norm.eps) if "q_norm" in self else None
        values, weights = (self._values, self._weights) if "_values" in self else self._constants()
        # one kernel leaves keys and values side by side, as a fixed buffer has them
        turned = shared.angles.turn_some(qkv, shape, normed, weights, values)
        # [B, heads, L, size]
        heads = (
            turned.reshape(batch, -1, 1, self.size) if length == 1 else turned.reshape(shape).swapaxes(1, 2)
        )
        if isinstance(cache, FixedKV):
            q, both = mx.split(heads, [self.heads], axis=1)
            k, v = cache.write(both)
        else:
            q, k, v = mx.split(heads, [self.heads, self.heads + self.kv_heads], axis=1)
            if cache is not None:
                k, v = cache.update_and_fetch(k, v)
        if shared.last_only:
            q, lengths = q[:, :, -1:], [1]
        out = attend_cached(q, k, v, cache, scale=self.scale, mask=shared.mask)
        return (out if q.shape[2] == 1 else out.transpose(0, 2, 1, 3)).reshape(batch, *lengths, -1)


@partial(mx.compile, shapeless=True)
def _gate(x: mx.array, gate: mx.array) -> mx.array:
    return x * mx.sigmoid(gate)


class GatedAttention(Attention):
    """Attention whose output is gated: ``q_proj`` gives each head a query and a gate, side by side (Qwen3.5)."""

    def __init__(
        self,
        hidden: int,
        heads: int,
        kv_heads: int,
        size: int,
        *,
        bias: bool,
        norm_eps: float,
        rotated: int,
    ) -> None:
        super().__init__(
            hidden,
            heads,
            kv_heads,
            size,
            bias=bias,
            output_bias=bias,
            norm_eps=norm_eps,
            rotated=rotated,
        )
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
        return _gate(self.attend(qkv, shared, cache), gate[:, -1:] if shared.last_only else gate)

    def _gate_and_heads(self, x: mx.array) -> tuple[mx.array, mx.array]:
        if "qkv_proj" in self:
            gate, qkv = mx.split(apply(self.qkv_proj, x), [self.heads * self.size], axis=-1)
            return gate, qkv
        pairs = mx.unflatten(apply(self.q_proj, x), -1, (self.heads, 2, self.size))
        query, gate = (pairs[..., half, :].flatten(-2) for half in (0, 1))
        return gate, mx.concatenate([query, apply(self.k_proj, x), apply(self.v_proj, x)], axis=-1)
