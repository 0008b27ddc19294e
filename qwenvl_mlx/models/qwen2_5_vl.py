"""Qwen2.5-VL (2025): windowed attention and gated feed-forward in the vision tower, absolute time; Qwen2's decoder.

Source of every rule: the released checkpoints' configuration and the PyTorch code of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.nn as nn

from qwenvl_mlx.config import from_dict, one_of
from qwenvl_mlx.errors import ConfigError
from qwenvl_mlx.layers.grid import Segments, Windows, patch_angles
from qwenvl_mlx.layers.mlp import MLP
from qwenvl_mlx.layers.stages import Stages
from qwenvl_mlx.layers.vision import PatchEmbed, PatchMerger, StagedTower, VisionAttention, VisionBlock
from qwenvl_mlx.media import Features, Media
from qwenvl_mlx.models.mrope import vision_section
from qwenvl_mlx.models.qwen2_vl import Qwen2Model


@dataclass(frozen=True)
class VisionConfig:
    """``window_size``: side of a window in pixels; ``fullatt_block_indexes``: blocks that see the whole frame."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    fullatt_block_indexes: tuple[int, ...]
    hidden_act: str = "silu"
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    tokens_per_second: float = 2
    window_size: int = 112

    def __post_init__(self) -> None:
        one_of(self.hidden_act, ["silu"], key="vision_config.hidden_act")
        if self.window_side < 1:
            raise ConfigError(f"vision_config: window_size {self.window_size} is smaller than a merged patch")

    @property
    def window_side(self) -> int:
        """In units of merged patches."""
        return self.window_size // self.spatial_merge_size // self.patch_size


class VisionTower(StagedTower):
    """Patches of one picture or video -> its features. Between, patches stand window by window."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        norm = partial(nn.RMSNorm, config.hidden_size, 1e-6)
        self.patch_embed = PatchEmbed(
            config.in_channels, config.hidden_size, config.temporal_patch_size, config.patch_size, bias=False
        )
        self.blocks = [
            VisionBlock(
                norm,
                VisionAttention(config.hidden_size, config.num_heads),
                MLP(config.hidden_size, config.intermediate_size, bias=True),
            )
            for _ in range(config.depth)
        ]
        self.merger = PatchMerger(norm, config.hidden_size, config.spatial_merge_size, config.out_hidden_size)

    def stages(self, media: Media) -> Stages[Features]:
        config, grid = self.config, media.grid
        windows = Windows.of(grid, config.spatial_merge_size, config.window_side)
        frames = Segments.frames(grid)
        hidden = self.patch_embed(media)[windows.order]  # [patches, hidden_size]
        angles = patch_angles(grid, config.spatial_merge_size, config.hidden_size // config.num_heads)
        angles = angles.take(windows.order)
        slots = windows.segments.slots(angles)
        for index, block in enumerate(self.blocks):
            if index in config.fullatt_block_indexes:
                hidden = block(hidden, angles, frames)
            else:
                hidden = block(hidden, slots, windows.segments)
            yield hidden
        return Features(self.merger(hidden)[windows.restore])


class Model(Qwen2Model):
    """``model_type`` ``qwen2_5_vl``."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        vision = from_dict(VisionConfig, vision_section(config), where="vision_config")
        super().__init__(
            config,
            VisionTower(vision),
            merge=vision.spatial_merge_size,
            ticks_per_second=vision.tokens_per_second,
        )
