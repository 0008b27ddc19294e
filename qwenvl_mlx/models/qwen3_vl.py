"""Qwen3-VL (2025): resampled position table and DeepStack in the vision tower; the Qwen3 decoder.

Source of every rule: the released checkpoints' configuration and the PyTorch code of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qwenvl_mlx.config import from_dict, one_of
from qwenvl_mlx.errors import ConfigError
from qwenvl_mlx.layers.attention import Attention
from qwenvl_mlx.layers.decoder import Decoder, DecoderConfig, DecoderLayer
from qwenvl_mlx.layers.grid import Segments, bilinear_taps, patch_angles
from qwenvl_mlx.layers.linear import apply
from qwenvl_mlx.layers.mlp import MLP
from qwenvl_mlx.layers.rotary import MRope
from qwenvl_mlx.layers.spans import Placeholders
from qwenvl_mlx.layers.stages import Stages
from qwenvl_mlx.layers.vision import (
    ACTIVATIONS,
    PatchEmbed,
    StagedTower,
    TwoLayers,
    VisionAttention,
    VisionBlock,
    merge_rows,
)
from qwenvl_mlx.layers.weights import to_mlx_layout
from qwenvl_mlx.media import Features, Media
from qwenvl_mlx.models.mrope import MRopeModel, text_section, tied, vision_section

ROPE = {"rope_theta": 5e5, "mrope_section": (24, 20, 20)}


@dataclass(frozen=True)
class VisionConfig:
    """``deepstack_visual_indexes``: blocks whose output also goes to the decoder's first layers."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...] = ()
    hidden_act: str = "gelu_pytorch_tanh"
    in_channels: int = 3
    patch_size: int = 16
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2

    def __post_init__(self) -> None:
        one_of(self.hidden_act, ACTIVATIONS, key="vision_config.hidden_act")
        if isqrt(self.num_position_embeddings) ** 2 != self.num_position_embeddings:
            raise ConfigError(
                f"vision_config: num_position_embeddings {self.num_position_embeddings} is not a square"
            )


@dataclass(frozen=True)
class TextConfig(DecoderConfig):
    """The Qwen3 decoder's keys: its head size does not follow from the width."""

    head_dim: int | None = 128


class Merger(nn.Module):
    """Blocks of patches become one token; the norm is before (``grouped`` False) or after they are joined."""

    def __init__(self, config: VisionConfig, *, grouped: bool) -> None:
        super().__init__()
        self.merge, self.grouped = config.spatial_merge_size, grouped
        width = config.hidden_size * self.merge**2
        self.norm = nn.LayerNorm(width if grouped else config.hidden_size, 1e-6)
        self.linear_fc1 = nn.Linear(width, width)
        self.linear_fc2 = nn.Linear(width, config.out_hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.norm(merge_rows(x, self.merge)) if self.grouped else merge_rows(self.norm(x), self.merge)
        return apply(self.linear_fc2, nn.gelu(apply(self.linear_fc1, x)))


class VisionTower(StagedTower):
    """Patches of one picture or video -> its features, and one more set for each DeepStack tap."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        width, inner = config.hidden_size, config.intermediate_size
        norm = partial(nn.LayerNorm, width, 1e-6)
        activation = ACTIVATIONS[config.hidden_act]
        self.patch_embed = PatchEmbed(
            config.in_channels, width, config.temporal_patch_size, config.patch_size, bias=True
        )
        self.pos_embed = nn.Embedding(config.num_position_embeddings, width)
        self.blocks = [
            VisionBlock(
                norm,
                VisionAttention(width, config.num_heads),
                TwoLayers(("linear_fc1", "linear_fc2"), (width, inner, width), activation),
            )
            for _ in range(config.depth)
        ]
        self.merger = Merger(config, grouped=False)
        self.deepstack_merger_list = [Merger(config, grouped=True) for _ in config.deepstack_visual_indexes]

    def stages(self, media: Media) -> Stages[Features]:
        config, grid = self.config, media.grid
        hidden = self.patch_embed(media)  # [patches, hidden_size]
        hidden = (mx.unflatten(hidden, 0, (grid[0], -1)) + self._positions(media)).flatten(0, 1)
        angles = patch_angles(grid, config.spatial_merge_size, config.hidden_size // config.num_heads)
        segments = Segments.frames(grid)
        taps = []
        for index, block in enumerate(self.blocks):
            hidden = block(hidden, angles, segments)
            if index in config.deepstack_visual_indexes:
                tap = config.deepstack_visual_indexes.index(index)
                taps.append(self.deepstack_merger_list[tap](hidden))
            yield hidden
        return Features(self.merger(hidden), tuple(taps))

    def _positions(self, media: Media) -> mx.array:
        """The square position table at the size of one frame, ``[patches of a frame, hidden_size]``."""
        config, table = self.config, self.pos_embed.weight
        side = isqrt(config.num_position_embeddings)
        taps = bilinear_taps(media.grid, config.spatial_merge_size, side)
        rows = [table[mx.array(index)].astype(mx.float32) * mx.array(share)[:, None] for index, share in taps]
        return ((rows[0] + rows[1]) + (rows[2] + rows[3])).astype(table.dtype)


class Qwen3Model(MRopeModel):
    """Qwen3-VL's vision tower before these layers. ``rope``, ``image``, ``video``: what a generation has by default."""

    def __init__(
        self,
        config: Mapping[str, Any],
        text: DecoderConfig,
        layers: Sequence[DecoderLayer],
        *,
        rope: Mapping[str, Any] = ROPE,
        image: int = 151655,
        video: int = 151656,
    ) -> None:
        vision = from_dict(VisionConfig, vision_section(config), where="vision_config")
        super().__init__(
            config,
            vision=VisionTower(vision),
            decoder=Decoder(text, layers, tied=tied(config)),
            text=text,
            rope=MRope.of(text_section(config), text.head_size, interleaved=True, defaults=rope),
            placeholders=Placeholders(
                image=config.get("image_token_id", image),
                video=config.get("video_token_id", video),
                merge=vision.spatial_merge_size,
                frame_spans=True,
            ),
        )

    @classmethod
    def sanitize(cls, weights: dict[str, mx.array], config: Mapping[str, Any]) -> dict[str, mx.array]:
        return to_mlx_layout(weights, channels=vision_section(config)["in_channels"], tied=tied(config))


class Model(Qwen3Model):
    """``model_type`` ``qwen3_vl``."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        text = from_dict(TextConfig, text_section(config), where="text_config")
        layers = [
            DecoderLayer(text, attention(text), MLP(text.hidden_size, text.intermediate_size))
            for _ in range(text.num_hidden_layers)
        ]
        super().__init__(config, text, layers)


def attention(config: DecoderConfig) -> Attention:
    """Queries and keys are normed."""
    return Attention(
        config.hidden_size,
        config.num_attention_heads,
        config.kv_heads,
        config.head_size,
        bias=config.attention_bias,
        output_bias=config.attention_bias,
        norm_eps=config.rms_norm_eps,
    )
