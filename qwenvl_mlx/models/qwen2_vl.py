"""Qwen2-VL (2024): a vision tower with 2-D rotary positions, the Qwen2 decoder with M-RoPE.

Source of every rule: the released checkpoints' configuration and the PyTorch code of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qwenvl_mlx.config import from_dict, one_of
from qwenvl_mlx.layers.attention import Attention
from qwenvl_mlx.layers.decoder import Decoder, DecoderConfig, DecoderLayer
from qwenvl_mlx.layers.grid import Segments, patch_angles
from qwenvl_mlx.layers.mlp import MLP
from qwenvl_mlx.layers.rotary import MRope
from qwenvl_mlx.layers.spans import Placeholders
from qwenvl_mlx.layers.stages import Stages
from qwenvl_mlx.layers.vision import (
    ACTIVATIONS,
    PatchEmbed,
    PatchMerger,
    StagedTower,
    TwoLayers,
    VisionAttention,
    VisionBlock,
)
from qwenvl_mlx.layers.weights import to_mlx_layout
from qwenvl_mlx.media import Features, Media
from qwenvl_mlx.models.mrope import MRopeModel, text_section, tied, vision_section

ROPE = {"rope_theta": 1e6}


@dataclass(frozen=True)
class VisionConfig:
    """``hidden_size`` is the width of the features; ``embed_dim`` that of the tower."""

    depth: int
    embed_dim: int
    hidden_size: int
    num_heads: int
    mlp_ratio: float = 4
    hidden_act: str = "quick_gelu"
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2

    def __post_init__(self) -> None:
        one_of(self.hidden_act, ACTIVATIONS, key="vision_config.hidden_act")


class VisionTower(StagedTower):
    """Patches of one picture or video -> its features."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        width, inner = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
        norm = partial(nn.LayerNorm, width, 1e-6)
        activation = ACTIVATIONS[config.hidden_act]
        self.patch_embed = PatchEmbed(
            config.in_channels, width, config.temporal_patch_size, config.patch_size, bias=False
        )
        self.blocks = [
            VisionBlock(
                norm,
                VisionAttention(width, config.num_heads),
                TwoLayers(("fc1", "fc2"), (width, inner, width), activation),
            )
            for _ in range(config.depth)
        ]
        self.merger = PatchMerger(norm, width, config.spatial_merge_size, config.hidden_size)

    def stages(self, media: Media) -> Stages[Features]:
        config = self.config
        hidden = self.patch_embed(media)  # [patches, embed_dim]
        angles = patch_angles(media.grid, config.spatial_merge_size, config.embed_dim // config.num_heads)
        segments = Segments.frames(media.grid)
        for block in self.blocks:
            hidden = block(hidden, angles, segments)
            yield hidden
        return Features(self.merger(hidden))


class Qwen2Model(MRopeModel):
    """A vision tower before the Qwen2 decoder. ``ticks_per_second``: of the temporal axis, where time is absolute."""

    def __init__(
        self,
        config: Mapping[str, Any],
        vision: StagedTower,
        *,
        merge: int,
        ticks_per_second: float | None = None,
    ) -> None:
        text = from_dict(DecoderConfig, text_section(config))
        super().__init__(
            config,
            vision=vision,
            decoder=decoder(text, tied=tied(config, nested=True)),
            text=text,
            rope=MRope.of(text_section(config), text.head_size, interleaved=False, defaults=ROPE),
            placeholders=Placeholders(
                image=config.get("image_token_id", 151655),
                video=config.get("video_token_id", 151656),
                merge=merge,
                ticks_per_second=ticks_per_second,
            ),
        )

    @classmethod
    def sanitize(cls, weights: dict[str, mx.array], config: Mapping[str, Any]) -> dict[str, mx.array]:
        return to_mlx_layout(
            weights, channels=vision_section(config)["in_channels"], tied=tied(config, nested=True)
        )


class Model(Qwen2Model):
    """``model_type`` ``qwen2_vl``."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        vision = from_dict(VisionConfig, vision_section(config), where="vision_config")
        super().__init__(config, VisionTower(vision), merge=vision.spatial_merge_size)


def decoder(config: DecoderConfig, *, tied: bool) -> Decoder:
    """The Qwen2 decoder: biases on queries, keys and values; no norm of them."""
    layers = [
        DecoderLayer(
            config,
            Attention(
                config.hidden_size, config.num_attention_heads, config.kv_heads, config.head_size, bias=True
            ),
            MLP(config.hidden_size, config.intermediate_size),
        )
        for _ in range(config.num_hidden_layers)
    ]
    return Decoder(config, layers, tied=tied)
