"""Qwen3.5, dense and MoE (2026): Qwen3-VL's vision tower without taps; gated delta nets and gated attention.

Source of every rule: the released checkpoints' configuration and the PyTorch code of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qwenvl_mlx.config import from_dict, one_of
from qwenvl_mlx.layers.attention import GatedAttention
from qwenvl_mlx.layers.decoder import DecoderConfig, DecoderLayer
from qwenvl_mlx.layers.delta_net import GatedDeltaNet
from qwenvl_mlx.layers.mlp import MLP, SharedExperts
from qwenvl_mlx.layers.rotary import MRope
from qwenvl_mlx.layers.weights import rename, split_experts
from qwenvl_mlx.models.mrope import text_section
from qwenvl_mlx.models.qwen3_vl import Qwen3Model

ROPE = {"mrope_section": (11, 11, 10), "partial_rotary_factor": 0.25}
LINEAR, FULL = "linear_attention", "full_attention"
# Norms that PyTorch stores as what is added to 1.
ZERO_CENTRED = re.compile(
    r"language_model\.model\.(norm|layers\.\d+\.(input_layernorm|post_attention_layernorm|self_attn\.[qk]_norm))\.weight"
)


@dataclass(frozen=True)
class TextConfig(DecoderConfig):
    """``layer_types``: which layers are recurrent; or every ``full_attention_interval``-th is not."""

    head_dim: int | None = 256
    layer_types: tuple[str, ...] | None = None
    full_attention_interval: int = 4
    attn_output_gate: bool = True
    linear_conv_kernel_dim: int = 4
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.attn_output_gate, [True], key="attn_output_gate")
        for kind in self.layer_types or ():
            one_of(kind, [LINEAR, FULL], key="layer_types")

    def is_linear(self, layer: int) -> bool:
        """Whether this layer is a delta net."""
        if self.layer_types is not None:
            return self.layer_types[layer] == LINEAR
        return (layer + 1) % self.full_attention_interval != 0


class Model(Qwen3Model):
    """``model_type`` ``qwen3_5`` and ``qwen3_5_moe``."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        text = from_dict(TextConfig, text_section(config), where="text_config")
        rope = MRope.of(text_section(config), text.head_size, interleaved=True, defaults=ROPE)
        layers = [_layer(text, index, rope.dims) for index in range(text.num_hidden_layers)]
        super().__init__(config, text, layers, rope=ROPE, image=248056, video=248057)

    @classmethod
    def sanitize(cls, weights: dict[str, mx.array], config: Mapping[str, Any]) -> dict[str, mx.array]:
        text = text_section(config)
        shifted = {name: _add_one(name, array) for name, array in weights.items()}
        renamed = super().sanitize(shifted, config)
        turned = {name: _channels_last(name, array) for name, array in renamed.items()}
        if not text.get("num_experts"):
            return turned
        return split_experts(turned, hidden=text["hidden_size"], inner=text["moe_intermediate_size"])

    @classmethod
    def keep_float32(cls, name: str) -> bool:
        """1 + w rounded to bfloat16 moves the logits by 0.1; the decay's exponent needs its digits too."""
        return bool(ZERO_CENTRED.fullmatch(name)) or name.endswith(".A_log")


def _layer(config: TextConfig, index: int, rotated: int) -> DecoderLayer:
    if config.is_linear(index):
        return DecoderLayer(config, _delta_net(config), _mlp(config), name="linear_attn")
    attention = GatedAttention(
        config.hidden_size,
        config.num_attention_heads,
        config.kv_heads,
        config.head_size,
        bias=config.attention_bias,
        norm_eps=config.rms_norm_eps,
        rotated=rotated,
    )
    return DecoderLayer(config, attention, _mlp(config))


def _delta_net(config: TextConfig) -> GatedDeltaNet:
    return GatedDeltaNet(
        config.hidden_size,
        config.linear_num_key_heads,
        config.linear_key_head_dim,
        config.linear_num_value_heads,
        config.linear_value_head_dim,
        config.linear_conv_kernel_dim,
        config.rms_norm_eps,
    )


def _mlp(config: TextConfig) -> nn.Module:
    if not config.num_experts:
        return MLP(config.hidden_size, config.intermediate_size)
    return SharedExperts(
        config.hidden_size,
        config.moe_intermediate_size,
        config.num_experts,
        config.num_experts_per_tok,
        config.shared_expert_intermediate_size,
    )


def _add_one(name: str, array: mx.array) -> mx.array:
    """PyTorch's zero-centred norms as plain ones, exactly; under MLX names the 1 was added before."""
    renamed = rename(name)
    if renamed == name or not ZERO_CENTRED.fullmatch(renamed):
        return array
    return array.astype(mx.float32) + 1


def _channels_last(name: str, array: mx.array) -> mx.array:
    """PyTorch's convolution ``(channels, 1, kernel)`` -> ``(channels, kernel, 1)``."""
    if name.endswith(".conv1d.weight") and array.shape[1] == 1:
        return array.swapaxes(1, 2)
    return array
