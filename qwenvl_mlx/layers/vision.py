"""Blocks of the vision towers of Qwen2-VL and later."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from qwenvl_mlx.errors import MediaError
from qwenvl_mlx.layers.cores import by_rows
from qwenvl_mlx.layers.exponential import exp_pays, swish
from qwenvl_mlx.layers.fused import attend
from qwenvl_mlx.layers.grid import Segments
from qwenvl_mlx.layers.linear import apply
from qwenvl_mlx.layers.rotary import Angles
from qwenvl_mlx.layers.stages import Stages, finish
from qwenvl_mlx.media import Features, Media

ROWS = 256  # of a feed-forward layer at once: they stay in the processor's cache, and its inner width fits any memory

Activation = Callable[[mx.array], mx.array]


def gelu_tanh(x: mx.array) -> mx.array:
    """``nn.gelu_approx`` in one kernel: (1 + tanh(u)) / 2 is sigmoid(2u), a chain short enough to be fused whole."""
    return swish(x, slope=_slope(x)) if exp_pays(x) else _gelu_tanh(x)


def quick_gelu(x: mx.array) -> mx.array:
    """``x * sigmoid(1.702 x)``."""
    return swish(x, rate=1.702) if exp_pays(x) else nn.gelu_fast_approx(x)


@partial(mx.compile, shapeless=True)
def _slope(x: mx.array) -> mx.array:
    slope = math.sqrt(8 / math.pi)
    return x * (slope + slope * 0.044715 * x * x)


@partial(mx.compile, shapeless=True)
def _gelu_tanh(x: mx.array) -> mx.array:
    wide = x.astype(mx.float32)
    return (wide * mx.sigmoid(_slope(wide))).astype(x.dtype)


ACTIVATIONS: dict[str, Activation] = {
    "quick_gelu": quick_gelu,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu": nn.gelu,
    "silu": nn.silu,
}


class PatchEmbed(nn.Module):
    """A convolution whose stride is its size: one product over the rows of patches."""

    def __init__(self, channels: int, width: int, temporal: int, patch: int, *, bias: bool) -> None:
        super().__init__()
        self.channels, self.temporal = channels, temporal
        kernel = (temporal, patch, patch)
        self.proj = nn.Conv3d(channels, width, kernel, stride=kernel, bias=bias)

    def __call__(self, media: Media) -> mx.array:
        """Rows ``[n, C*T*p*p]`` (or ``[n, C*p*p]`` of a still) -> ``[n, width]``."""
        weight = self.proj.weight.transpose(0, 4, 1, 2, 3).flatten(1)  # [width, C*T*p*p]
        rows = self._rows(media, weight.shape[1]).astype(weight.dtype)
        return mx.addmm(self.proj.bias, rows, weight.T) if "bias" in self.proj else rows @ weight.T

    def _rows(self, media: Media, width: int) -> mx.array:
        """Normalised rows with their temporal copies, float32 ``[n, C*T*p*p]``."""
        rows = mx.array(media.patches)
        patches = media.grid[0] * media.grid[1] * media.grid[2]
        still = rows.ndim == 2 and media.grid[0] == 1 and rows.shape[1] * self.temporal == width
        if rows.ndim != 2 or rows.shape[0] != patches or not (still or rows.shape[1] == width):
            raise MediaError(
                f"patches {tuple(rows.shape)} don't fit grid {media.grid}: [{patches}, {width}] is needed"
            )
        if rows.dtype == mx.uint8:
            rows = self._normalise(rows, media)
        if still:
            rows = mx.repeat(rows.reshape(patches, self.channels, 1, -1), self.temporal, axis=2)
        return rows.reshape(patches, width)

    def _normalise(self, rows: mx.array, media: Media) -> mx.array:
        if media.mean is None or media.std is None:
            raise MediaError("uint8 patches need mean and std: give both, or normalised float32 patches")
        pixels = rows.reshape(len(rows), self.channels, -1).astype(mx.float32)
        mean, std = (mx.array(value, mx.float32)[:, None] for value in (media.mean, media.std))
        return (pixels / 255 - mean) / std


class VisionAttention(nn.Module):
    """Full attention within segments; one product gives queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def __call__(self, x: mx.array, angles: Angles, segments: Segments) -> mx.array:
        """``[patches, width]`` -> the same. ``angles``: of the segments' slots."""
        qkv = apply(self.qkv, x)
        if segments.index is not None:
            qkv = qkv[segments.index]
        qk, v = mx.split(qkv.reshape(len(qkv), 3 * self.heads, -1), [2 * self.heads], axis=1)
        rows = (segments.count, segments.length)
        qk = mx.unflatten(angles.turn(qk), 0, rows).transpose(0, 2, 1, 3)
        q, k = mx.split(qk, 2, axis=1)
        v = mx.unflatten(v, 0, rows).transpose(0, 2, 1, 3)  # [segments, heads, length, size]
        out = attend(q, k, v, scale=self.scale, mask=segments.valid)
        out = out.transpose(0, 2, 1, 3).reshape(-1, x.shape[-1])
        return apply(self.proj, out if segments.back is None else out[segments.back])


class VisionBlock(nn.Module):
    """Pre-norm attention and feed-forward, each added to the stream."""

    def __init__(self, norm: Callable[[], nn.Module], attention: VisionAttention, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(), norm()
        self.attn, self.mlp = attention, mlp

    def __call__(self, x: mx.array, angles: Angles, segments: Segments) -> mx.array:
        x = x + self.attn(self.norm1(x), angles, segments)
        return by_rows(lambda rows: rows + self.mlp(self.norm2(rows)), x, most=ROWS)


class StagedTower(nn.Module):
    """A vision tower that can pause after each of its blocks."""

    def stages(self, media: Media) -> Stages[Features]:
        """Patches of one picture or video -> its features; yields the rows ``[patches, width]`` after each block."""
        raise NotImplementedError

    def __call__(self, media: Media) -> Features:
        return finish(self.stages(media))


class TwoLayers(nn.Module):
    """``second(activation(first(x)))`` under the names that a generation gives the two."""

    def __init__(self, names: Sequence[str], widths: Sequence[int], activation: Activation) -> None:
        super().__init__()
        self.first, self.second = names
        self.activation = activation
        self[self.first] = nn.Linear(widths[0], widths[1])
        self[self.second] = nn.Linear(widths[1], widths[2])

    def __call__(self, x: mx.array) -> mx.array:
        return apply(self[self.second], self.activation(apply(self[self.first], x)))


class PatchMerger(nn.Module):
    """Qwen2's: a norm of each patch; then ``merge x merge`` of them become one token of ``out`` numbers."""

    def __init__(self, norm: Callable[[], nn.Module], width: int, merge: int, out: int) -> None:
        super().__init__()
        self.merge = merge
        joined = width * merge**2
        self.ln_q = norm()
        self.mlp = [nn.Linear(joined, joined), nn.GELU(), nn.Linear(joined, out)]

    def __call__(self, x: mx.array) -> mx.array:
        first, activation, second = self.mlp
        return apply(second, activation(apply(first, merge_rows(self.ln_q(x), self.merge))))


def merge_rows(x: mx.array, merge: int) -> mx.array:
    """Each block of ``merge x merge`` patches side by side: ``[n, d]`` -> ``[n / merge², merge² d]``."""
    return x.reshape(-1, merge * merge * x.shape[-1])
