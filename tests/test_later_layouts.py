"""Names and orientation of weights: every layout found on hubs is the same model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import pytest
from helpers import reference

from qwenvl_mlx.layers.weights import rename, split_experts
from qwenvl_mlx.models import model_class

FOLDERS = (
    "qwen2_vl/tiny-hub",
    "qwen2_vl/tiny",
    "qwen2_5_vl/tiny-hub",
    "qwen3_vl/tiny",
    "qwen3_vl_moe/tiny-hub",
    "qwen3_vl_moe/tiny",
    "qwen3_5/tiny",
    "qwen3_5_moe/tiny-hub",
    "mlx_folders/q2-4bit",
    "mlx_folders/q3moe-bf16",
    "mlx_folders/q35-bf16",
)


def read(folder: str) -> tuple[dict[str, mx.array], dict[str, Any]]:
    path = reference(folder)
    weights: dict[str, mx.array] = {}
    for file in sorted(path.glob("*.safetensors")):
        weights |= mx.load(str(file))
    return weights, json.loads((path / "config.json").read_text())


def same(one: Mapping[str, mx.array], other: Mapping[str, mx.array]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and mx.array_equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("folder", FOLDERS)
def test_sanitize_is_pure_and_idempotent(folder: str) -> None:
    weights, config = read(folder)
    names = list(weights)
    cls = model_class(config)
    once = cls.sanitize(weights, config)
    assert list(weights) == names
    assert same(cls.sanitize(once, config), once)
    assert all(name.startswith(("vision_tower.", "language_model.")) for name in once)
    if folder.startswith("mlx_folders"):
        assert same(once, weights)


def test_layouts_of_one_checkpoint_agree() -> None:
    for first, second in (
        ("qwen2_vl/tiny-hub", "qwen2_vl/tiny"),
        ("qwen3_vl_moe/tiny-hub", "qwen3_vl_moe/tiny"),
    ):
        (one, config), (other, other_config) = read(first), read(second)
        assert same(
            model_class(config).sanitize(one, config), model_class(other_config).sanitize(other, other_config)
        )


def test_zero_centred_norms_are_exact() -> None:
    weights, config = read("qwen3_5/tiny")
    cls = model_class(config)
    name = "layers.0.input_layernorm.weight"
    ours = cls.sanitize(weights, config)[f"language_model.model.{name}"]
    assert ours.dtype == mx.float32
    assert mx.array_equal(ours - 1, weights[f"model.language_model.{name}"].astype(mx.float32))
    assert cls.keep_float32(f"language_model.model.{name}")
    assert not cls.keep_float32("language_model.model.layers.0.linear_attn.norm.weight")


def test_what_inference_does_not_use_is_dropped() -> None:
    weights, config = read("qwen3_5/tiny")
    assert any(name.startswith("mtp.") for name in weights)
    assert not any("mtp" in name for name in model_class(config).sanitize(weights, config))
    weights, config = read("qwen2_vl/tiny-hub")
    weights |= {"lm_head.weight": weights["model.embed_tokens.weight"], "visual.rotary.inv_freq": mx.zeros(2)}
    kept = model_class(config).sanitize(weights, config)
    assert not any("lm_head" in name or "inv_freq" in name for name in kept)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("visual.blocks.0.attn.qkv.scales", "vision_tower.blocks.0.attn.qkv.scales"),
        ("model.layers.3.mlp.up_proj.biases", "language_model.model.layers.3.mlp.up_proj.biases"),
        ("model.language_model.norm.weight", "language_model.model.norm.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("language_model.model.norm.weight", "language_model.model.norm.weight"),
        ("something.else", "something.else"),
    ],
)
def test_rename(name: str, wanted: str) -> None:
    assert rename(name) == wanted


@pytest.mark.parametrize(("hidden", "inner"), [(12, 5), (8, 8), (8, 4)])
def test_experts_under_every_layout(hidden: int, inner: int) -> None:
    """Also where one of the two tensors is square, so that its shape alone does not tell."""
    layer, count = "language_model.model.layers.0.mlp", 3
    gate, up = mx.random.normal((2, count, inner, hidden))
    down = mx.random.normal((count, hidden, inner))
    joined = mx.concatenate([gate, up], axis=1)
    outputs_first = {f"{layer}.experts.gate_up_proj": joined, f"{layer}.experts.down_proj": down}
    inputs_first = {name: array.swapaxes(1, 2) for name, array in outputs_first.items()}
    each = {
        f"{layer}.experts.{expert}.{name}.weight": array[expert]
        for name, array in (("gate_proj", gate), ("up_proj", up), ("down_proj", down))
        for expert in range(count)
    }
    wanted = {
        f"{layer}.switch_mlp.gate_proj.weight": gate,
        f"{layer}.switch_mlp.up_proj.weight": up,
        f"{layer}.switch_mlp.down_proj.weight": down,
    }
    for layout in (outputs_first, inputs_first, each, wanted):
        assert same(split_experts(layout, hidden=hidden, inner=inner), wanted)
