"""Qwen3-VL MoE (2025): Qwen3-VL with mixtures of experts in the decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qwenvl_mlx.config import from_dict
from qwenvl_mlx.layers.decoder import DecoderLayer
from qwenvl_mlx.layers.mlp import MLP, Experts
from qwenvl_mlx.layers.weights import split_experts
from qwenvl_mlx.models.mrope import text_section
from qwenvl_mlx.models.qwen3_vl import Qwen3Model, TextConfig, attention


@dataclass(frozen=True, kw_only=True)
class MoEConfig(TextConfig):
    """``decoder_sparse_step``, ``mlp_only_layers``: which layers have experts."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    def is_sparse(self, layer: int) -> bool:
        """Whether this layer has experts instead of one feed-forward layer."""
        return (
            layer not in self.mlp_only_layers
            and self.num_experts > 0
            and (layer + 1) % self.decoder_sparse_step == 0
        )


class Model(Qwen3Model):
    """``model_type`` ``qwen3_vl_moe``."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        text = from_dict(MoEConfig, text_section(config), where="text_config")
        layers = [
            DecoderLayer(text, attention(text), _mlp(text, index)) for index in range(text.num_hidden_layers)
        ]
        super().__init__(config, text, layers)

    @classmethod
    def sanitize(cls, weights: dict[str, mx.array], config: Mapping[str, Any]) -> dict[str, mx.array]:
        text = text_section(config)
        return split_experts(
            super().sanitize(weights, config), hidden=text["hidden_size"], inner=text["moe_intermediate_size"]
        )


def _mlp(config: MoEConfig, layer: int) -> nn.Module:
    if not config.is_sparse(layer):
        return MLP(config.hidden_size, config.intermediate_size)
    return Experts(
        config.hidden_size, config.moe_intermediate_size, config.num_experts, config.num_experts_per_tok
    )
