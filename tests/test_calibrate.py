"""GPTQ: less error in a layer's outputs than plain rounding, in MLX's own form, on every generation's layers."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers import reference

from qwenvl_mlx.checkpoint import load_model, read
from qwenvl_mlx.convert import calibrate, convert
from qwenvl_mlx.convert.calibrate import gptq
from qwenvl_mlx.convert.options import Settings
from qwenvl_mlx.errors import ConfigError, PromptError
from qwenvl_mlx.media import Prompt

SETTINGS = Settings(4, 32)


@pytest.fixture
def layer() -> tuple[mx.array, mx.array]:
    """Weights ``[64, 128]``, and inputs ``[1000, 128]`` that are correlated and of unequal size, as real ones are."""
    random = np.random.default_rng(0)
    mixing = random.normal(size=(128, 128)) * np.exp(random.normal(size=128))
    inputs = random.normal(size=(1000, 128)) @ mixing
    return mx.array(random.normal(size=(64, 128)).astype(np.float32)), mx.array(inputs.astype(np.float32))


def output_error(inputs: mx.array, weight: mx.array, parts: list[mx.array]) -> float:
    rounded = mx.dequantize(*parts, SETTINGS.group_size, SETTINGS.bits)
    return (mx.linalg.norm(inputs @ (weight - rounded).T) / mx.linalg.norm(inputs @ weight.T)).item()


def test_outputs_change_less_than_with_plain_rounding(layer: tuple[mx.array, mx.array]) -> None:
    weight, inputs = layer
    plain = output_error(inputs, weight, list(mx.quantize(weight, SETTINGS.group_size, SETTINGS.bits)))
    result = gptq("m", weight, inputs.T @ inputs, SETTINGS, mx.float32)
    calibrated = output_error(
        inputs, weight, [result[f"m.{kind}"] for kind in ("weight", "scales", "biases")]
    )
    print(f"plain {plain:.4f}, calibrated {calibrated:.4f}")
    assert calibrated < 0.8 * plain


def test_inputs_that_never_occur_do_no_harm(layer: tuple[mx.array, mx.array]) -> None:
    weight, inputs = layer
    inputs[:, 40:90] = 0
    result = gptq("m", weight, inputs.T @ inputs, SETTINGS, mx.float32)
    assert all(bool(mx.all(mx.isfinite(part.astype(mx.float32)))) for part in result.values())
    calibrated = output_error(
        inputs, weight, [result[f"m.{kind}"] for kind in ("weight", "scales", "biases")]
    )
    assert calibrated < output_error(
        inputs, weight, list(mx.quantize(weight, SETTINGS.group_size, SETTINGS.bits))
    )


@pytest.mark.parametrize(
    "source", ["qwen_vl/ckpt/tiny_chat/bin_bf16", "qwen2_vl/tiny-hub", "qwen3_vl/tiny", "qwen3_5/tiny"]
)
def test_every_generation_can_be_calibrated(tmp_path: Path, source: str) -> None:
    options = {"quantize": True, "q_group_size": 32, "q_vision": 8, "q_report": "weights"}
    plain = convert(reference(source), tmp_path / "plain", **options).folder
    result = convert(reference(source), tmp_path / "m", q_calibrate=True, **options).folder
    ours, theirs = read(result), read(plain)
    assert {name: (array.shape, array.dtype) for name, array in ours.items()} == {
        name: (array.shape, array.dtype) for name, array in theirs.items()
    }
    changed = {
        name for name in ours if name.endswith(".weight") and not mx.array_equal(ours[name], theirs[name])
    }
    assert any("mlp" in name and name.startswith("language_model") for name in changed)
    if "qwen_vl" in source:  # the other tiny folders carry no chat template, and so see no pictures
        assert any(name.startswith("vision_tower") for name in changed)
    model = load_model(result, "float32")
    assert bool(mx.all(mx.isfinite(model.logits(Prompt([1, 2, 3])))))


def test_many_passes_give_what_one_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = reference("qwen2_vl/tiny-hub")
    options = {"quantize": True, "q_group_size": 32, "q_report": "weights", "q_calibrate": True}
    one = read(convert(source, tmp_path / "one", **options).folder)
    monkeypatch.setattr(calibrate, "BUDGET", 100_000)
    many = read(convert(source, tmp_path / "many", **options).folder)
    assert all(mx.array_equal(one[name], many[name]) for name in one)


def test_own_texts_and_conversations_can_be_given(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(["One text.", [{"role": "user", "content": "A question?"}]]))
    source = reference("qwen_vl/ckpt/tiny_chat/bin_bf16")
    result = convert(source, tmp_path / "m", quantize=True, q_calibrate=file, q_report="weights").folder
    recorded = json.loads((result / "qwenvl_mlx.json").read_text())
    assert recorded["options"]["calibrated"] is True
    assert "GPTQ" in (result / "README.md").read_text()


def test_what_can_not_be_done_is_refused_before_work_begins(tmp_path: Path) -> None:
    source = reference("qwen_vl/ckpt/tiny_chat/bin_bf16")
    with pytest.raises(ConfigError, match="add -q"):
        convert(source, tmp_path / "m", q_calibrate=True)
    with pytest.raises(ConfigError, match="affine"):
        convert(source, tmp_path / "m", quantize=True, q_mode="mxfp4", q_calibrate=True)
    with pytest.raises(PromptError, match="--q-calibrate"):
        convert(source, tmp_path / "m", quantize=True, q_calibrate=tmp_path / "absent.json")
    assert not list(tmp_path.iterdir())
