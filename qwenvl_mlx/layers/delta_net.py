"""Gated delta net: linear attention with a state, behind a short causal convolution (Qwen3.5)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qwenvl_mlx.layers.attention import Pass
from qwenvl_mlx.layers.cache import kv
from qwenvl_mlx.layers.linear import join_children, project
from qwenvl_mlx.layers.mlx_lm import leaf

delta = leaf("models.gated_delta")

PROJECTIONS = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")


@partial(mx.compile, shapeless=True)
def _convolve(taps: Sequence[mx.array], weights: Sequence[mx.array]) -> mx.array:
    """``silu(sum of tap * weight)``, in float32 and left so: the delta rule wants the digits."""
    total = mx.zeros((), mx.float32)
    for tap, weight in zip(taps, weights, strict=True):
        total = total + tap.astype(mx.float32) * weight
    return total * mx.sigmoid(total)


@partial(mx.compile, shapeless=True)
def _gate(x: mx.array, z: mx.array) -> mx.array:
    """``x * silu(z)``, in float32; then in z's type."""
    wide = z.astype(mx.float32)
    return (x * wide * mx.sigmoid(wide)).astype(z.dtype)


class GatedDeltaNet(nn.Module):
    """Query/key heads may be fewer than value heads; each then serves several, one after the other."""

    def __init__(
        self,
        hidden: int,
        key_heads: int,
        key_size: int,
        value_heads: int,
        value_size: int,
        kernel: int,
        eps: float,
    ) -> None:
        super().__init__()
        self.key_heads, self.key_size = key_heads, key_size
        self.value_heads, self.value_size = value_heads, value_size
        self.kernel, self.eps = kernel, eps
        keys, values = key_heads * key_size, value_heads * value_size
        channels = 2 * keys + values
        self.sizes = (keys, values, channels)
        self.in_proj_qkv = nn.Linear(hidden, channels, bias=False)
        self.in_proj_z = nn.Linear(hidden, values, bias=False)
        self.in_proj_b = nn.Linear(hidden, value_heads, bias=False)
        self.in_proj_a = nn.Linear(hidden, value_heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, kernel, groups=channels, bias=False)
        self.A_log = mx.zeros((value_heads,))
        self.dt_bias = mx.ones((value_heads,))
        self.norm = nn.RMSNorm(value_size, eps)
        self.out_proj = nn.Linear(values, hidden, bias=False)

    @property
    def output(self) -> nn.Module:
        """The last product, which the decoder layer adds to its stream."""
        return self.out_proj

    def new_cache(self) -> Any:
        """For one sequence: the last inputs of the convolution, and the state."""
        return kv.ArraysCache(2)

    def prepare(self) -> None:
        """Join the four products into one."""
        join_children(self, PROJECTIONS, "in_proj")

    def __call__(self, x: mx.array, shared: Pass, cache: Any | None) -> mx.array:
        """``[B, L, hidden]`` or ``[B, hidden]`` -> ``[…, value_heads * value_size]``, before ``out_proj``.

        ``cache``: an ArraysCache of two, the last inputs of the convolution and the state
        ``[B, value_heads, value_size, key_size]``, float32.
        """
        batch, length = len(x), 1 if x.ndim == 2 else x.shape[1]
        _, values, channels = self.sizes
        qkv, z, b, a = mx.split(
            project(self, PROJECTIONS, "in_proj", x).reshape(batch, length, -1),
            [channels, channels + values, channels + values + self.value_heads],
            axis=-1,
        )
        if shared.present is not None:
            qkv = mx.where(shared.present[..., None], qkv, 0)
        q, k, v = self._heads(self._conv(qkv, cache))
        q, k = delta.normalize_qk(q, k, inv_scale=self.key_size**-0.5, eps=1e-6)
        out, state = delta.gated_delta_update(
            q,
            k,
            v,
            a.astype(mx.float32),
            b,
            self.A_log,
            self.dt_bias,
            None if cache is None else cache[1],
            shared.present,
        )
        if cache is not None:
            cache[1] = state
            cache.advance(length)
        z = z.reshape(batch, length, self.value_heads, self.value_size)
        return _gate(self.norm(out), z).reshape(*x.shape[:-1], -1)

    def _conv(self, x: mx.array, cache: Any | None) -> mx.array:
        """Causal depthwise convolution and silu, ``[B, L, channels]``."""
        batch, length, channels = x.shape
        before = None if cache is None else cache[0]
        if before is None:
            before = mx.zeros((batch, self.kernel - 1, channels), x.dtype)
        x = mx.concatenate([before, x], axis=1)
        if cache is not None:
            cache[0] = mx.contiguous(x[:, length:])
        taps = [x[:, tap : tap + length] for tap in range(self.kernel)]
        return _convolve(taps, [self.conv1d.weight[:, tap, 0] for tap in range(self.kernel)])

    def _heads(self, qkv: mx.array) -> list[mx.array]:
        """Queries, keys and values, each ``[B, L, heads, size]``."""
        keys, _, _ = self.sizes
        parts = mx.split(qkv, [keys, 2 * keys], axis=-1)
        sizes = (self.key_size, self.key_size, self.value_size)
        return [mx.unflatten(part, -1, (-1, size)) for part, size in zip(parts, sizes, strict=True)]
