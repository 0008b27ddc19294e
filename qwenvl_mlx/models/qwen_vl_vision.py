"""The eyes of the original Qwen-VL: a ViT-bigG tower and a resampler to a fixed number of image tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qwenvl_mlx.config import from_dict
from qwenvl_mlx.errors import ConfigError
from qwenvl_mlx.layers.cores import by_rows
from qwenvl_mlx.layers.fused import attend
from qwenvl_mlx.layers.linear import apply, pad_heads
from qwenvl_mlx.layers.positions import resample_table
from qwenvl_mlx.layers.stages import Stages, finish
from qwenvl_mlx.layers.vision import ROWS

EPS = 1e-6
TABLE_ROWS = 256  # the stored position table is a 16x16 grid, whatever the picture's size
POOL_HEAD = 128
FUSED_HEADS = (64, 72, 80, 96, 128)  # head sizes that Metal's fused attention takes

RENAMES = (("attn_pool.pos_embed", "attn_pool.positions"), ("positional_embedding", "positions"))


@dataclass(frozen=True)
class VisionConfig:
    """The section ``visual`` of ``config.json``."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_ratio: float
    output_dim: int
    image_start_id: int
    n_queries: int = 256

    def __post_init__(self) -> None:
        if math.isqrt(self.n_queries) ** 2 != self.n_queries:
            raise ConfigError(f"config.json: visual.n_queries = {self.n_queries} is not a square number")
        if self.width % self.heads:
            raise ConfigError(
                f"config.json: visual.width {self.width} is not a multiple of {self.heads} heads"
            )
        if self.output_dim < POOL_HEAD or self.output_dim % self.pool_heads:
            raise ConfigError(f"config.json: visual.output_dim {self.output_dim} can't be split into heads")
        if self.image_size < self.patch_size:
            raise ConfigError("config.json: visual.image_size is smaller than one patch")

    @property
    def side(self) -> int:
        """Patches along each side of the picture."""
        return self.image_size // self.patch_size

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)

    @property
    def pool_heads(self) -> int:
        return self.output_dim // POOL_HEAD


def vision_config(raw: Mapping[str, Any]) -> VisionConfig:
    return from_dict(VisionConfig, raw, where="config.json: visual")


class PatchEmbedding(nn.Module):
    """Cut a picture into patches, row by row, and project each: a convolution whose stride is its size."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.weight = mx.zeros((config.width, config.patch_size, config.patch_size, 3))

    def __call__(self, pixels: mx.array) -> mx.array:
        width, size, _, _ = self.weight.shape
        side = pixels.shape[1] // size
        pixels = pixels[:, : side * size, : side * size].astype(self.weight.dtype)
        patches = pixels.reshape(3, side, size, side, size).transpose(1, 3, 2, 4, 0)  # [y, x, size, size, 3]
        return patches.reshape(side * side, -1) @ self.weight.reshape(width, -1).T


class Attention(nn.Module):
    """Every patch with every other. ``in_proj`` gives each head's query, key and value next to each other."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self._heads = config.heads
        self._size = config.width // config.heads
        self.in_proj = nn.Linear(config.width, 3 * config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def prepare(self) -> None:
        """Widen heads to what the fused kernel takes. Zeros add nothing to scores, and are cut off the output."""
        padded = next((size for size in FUSED_HEADS if size >= self._size), self._size)
        if padded != self._size:
            pad_heads(self.in_proj, self._size, padded)

    def __call__(self, x: mx.array) -> mx.array:
        patches, width = x.shape
        projected = apply(self.in_proj, x).reshape(1, patches, self._heads, 3, -1).transpose(3, 0, 2, 1, 4)
        query, key, value = projected  # each [1, heads, patches, padded size]
        x = attend(query, key, value, scale=self._size**-0.5)
        x = x[..., : self._size].transpose(0, 2, 1, 3).reshape(patches, width)
        return apply(self.out_proj, x)


class MLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.width, config.mlp_width)
        self.c_proj = nn.Linear(config.mlp_width, config.width)

    def __call__(self, x: mx.array) -> mx.array:
        return apply(self.c_proj, nn.gelu(apply(self.c_fc, x)))


class Block(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width, eps=EPS)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.width, eps=EPS)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.attn(self.ln_1(x))
        return by_rows(lambda rows: rows + self.mlp(self.ln_2(rows)), x, most=ROWS)


class Transformer(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.resblocks = [Block(config) for _ in range(config.layers)]


class PoolAttention(nn.Module):
    """Cross attention. The queries are the same for every picture, so they come in projected."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self._heads = config.pool_heads
        self.q_proj = nn.Linear(config.output_dim, config.output_dim)
        self.k_proj = nn.Linear(config.output_dim, config.output_dim)
        self.v_proj = nn.Linear(config.output_dim, config.output_dim)
        self.out_proj = nn.Linear(config.output_dim, config.output_dim)

    def __call__(self, query: mx.array, key: mx.array, value: mx.array) -> mx.array:
        heads = [
            x.reshape(1, len(x), self._heads, -1).transpose(0, 2, 1, 3)
            for x in (query, apply(self.k_proj, key), apply(self.v_proj, value))
        ]
        x = attend(*heads, scale=heads[0].shape[-1] ** -0.5)
        return apply(self.out_proj, x.transpose(0, 2, 1, 3).reshape(query.shape))


class Resampler(nn.Module):
    """Learned queries that gather ``[patches, width]`` into ``[n_queries, output_dim]``."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self._patches = config.side**2
        self.query = mx.zeros((config.n_queries, config.output_dim))
        self.positions = mx.zeros((config.n_queries, config.output_dim))
        if config.width != config.output_dim:
            self.kv_proj = nn.Linear(config.width, config.output_dim, bias=False)
        self.ln_q = nn.LayerNorm(config.output_dim, eps=EPS)
        self.ln_kv = nn.LayerNorm(config.output_dim, eps=EPS)
        self.attn = PoolAttention(config)

    def prepare(self) -> None:
        """Tables of this picture size. They are cast where they are used, so that ``set_dtype`` may follow."""
        self._key_positions = resample_table(self.positions, self._patches)
        self._query = self.attn.q_proj(self.ln_q(self.query) + self.positions)
        mx.eval(self._key_positions, self._query)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.ln_kv(apply(self.kv_proj, x) if "kv_proj" in self else x)  # [patches, output_dim]
        return self.attn(self._query.astype(x.dtype), x + self._key_positions.astype(x.dtype), x)


class VisionTower(nn.Module):
    """A picture ``[3, S, S]``, normalised -> features ``[n_queries, output_dim]``."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self._patches = config.side**2
        self.conv1 = PatchEmbedding(config)
        self.positions = mx.zeros((TABLE_ROWS, config.width))
        self.ln_pre = nn.LayerNorm(config.width, eps=EPS)
        self.transformer = Transformer(config)
        self.attn_pool = Resampler(config)
        self.ln_post = nn.LayerNorm(config.output_dim, eps=EPS)
        self.proj = nn.Linear(config.output_dim, config.output_dim, bias=False)

    def prepare(self) -> None:
        self._patch_positions = resample_table(self.positions, self._patches)

    def stages(self, pixels: mx.array) -> Stages[mx.array]:
        """Yields the rows after each block."""
        x = self.conv1(pixels)  # [patches, width]
        x = self.ln_pre(x + self._patch_positions.astype(x.dtype))
        for block in self.transformer.resblocks:
            x = block(x)
            yield x
        x = self.ln_post(self.attn_pool(x))
        return apply(self.proj, x)

    def __call__(self, pixels: mx.array) -> mx.array:
        return finish(self.stages(pixels))


def sanitize(name: str, weight: mx.array) -> dict[str, mx.array]:
    """One hub tensor, its name already below ``visual.`` -> the tensors of this file's modules."""
    if name == "conv1.weight":
        return {name: weight.transpose(0, 2, 3, 1)}
    if name == "proj":  # used as x @ proj
        return {"proj.weight": weight.T}
    for kind in ("weight", "bias"):
        if name == f"attn_pool.attn.in_proj_{kind}":
            parts = mx.split(weight, 3)
            return {
                f"attn_pool.attn.{letter}_proj.{kind}": part
                for letter, part in zip("qkv", parts, strict=True)
            }
    return {dict(RENAMES).get(name, name): weight}
