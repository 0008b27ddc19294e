"""The command that proves parity: it holds on every generation, sees a wrong number, and says what is missing."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers import HERE, reference

from qwenvl_mlx import parity, verify
from qwenvl_mlx.checkpoint import load_model
from qwenvl_mlx.errors import PromptError
from qwenvl_mlx.media import Media, Prompt
from qwenvl_mlx.parity import run_mlx, tapped
from qwenvl_mlx.parity_torch import run_hub_code, run_transformers

pytestmark = pytest.mark.filterwarnings("ignore")  # of the reference's libraries

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
CHECKPOINTS = [
    "qwen2_vl/tiny-hub",
    "qwen2_5_vl/tiny-hub",
    "qwen3_vl/tiny",
    "qwen3_vl_moe/tiny",
    "qwen3_5/tiny",
]
PICTURE = str(HERE / "data" / "images" / "rgb_97x61.png")


def small_prompt(config: dict[str, Any]) -> Prompt:
    """Two pictures of random patches, one of them a video's, between text."""
    vision, random = config["vision_config"], np.random.default_rng(0)
    channels = vision.get("in_channels", vision.get("in_chans", 3))
    row = channels * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    ids, media = [5], []
    for kind, grid in (("image", (1, 4, 6)), ("video", (1, 4, 4))):
        patches = random.standard_normal((grid[1] * grid[2], row), np.float32)
        seconds, stamps = (1.0, (0.5,)) if kind == "video" else (None, None)
        media.append(Media(kind, patches, grid, seconds_per_grid=seconds, timestamps=stamps))  # type: ignore[arg-type]
        tokens = [config[f"{kind}_token_id"]] * (len(patches) // vision["spatial_merge_size"] ** 2)
        ids += [config["vision_start_token_id"], *tokens, config["vision_end_token_id"], 7, 8]
    return Prompt(ids, media)


@needs_torch
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_parity_with_transformers(checkpoint: str) -> None:
    folder = reference(checkpoint)
    prompt = small_prompt(json.loads((folder / "config.json").read_text()))
    model = load_model(folder, "float32")
    ours = verify.Ours.of(model, prompt, 6)
    theirs = run_transformers(folder, prompt, ours.places, ours.stages.tokens, "float32")
    rows = list(verify.compare(ours, theirs, "float32"))
    print(verify.table(rows))
    assert not any(row.failed for row in rows)
    assert {"features 1", "features 2", "embeddings", "layer 1", "logits, decoded"} <= {
        row.stage for row in rows
    }


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    """A tiny original Qwen-VL with PyTorch code beside it, as the hub has it."""
    for path in reference("qwen_vl/ckpt/tiny_chat/safetensors_fp32").iterdir():
        shutil.copy(path, tmp_path)
    for path in (HERE / "qwen_vl_torch").glob("*.py"):
        shutil.copy(path, tmp_path)
    return tmp_path


@needs_torch
def test_the_command_on_the_original(hub_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = hub_folder / "kept.npz"
    command = [
        "--model",
        str(hub_folder),
        "--against",
        str(hub_folder),
        "--image",
        PICTURE,
        "--max-tokens",
        "4",
    ]
    assert verify.main(command) == 1
    assert "--trust-remote-code" in capsys.readouterr().err
    assert verify.main([*command, "--trust-remote-code", "--save", str(kept)]) == 0
    first = capsys.readouterr().out
    assert "parity holds: 8 of 8 stages" in first
    assert verify.main(["--model", str(hub_folder), "--golden", str(kept)]) == 0
    assert capsys.readouterr().out == first


@needs_torch
@pytest.mark.parametrize(
    ("length", "changes", "visual"),
    [
        (
            9,
            {"no_bias": False, "use_logn_attn": False},
            {"width": 128, "heads": 4},
        ),  # no kv_proj, padded heads
        (
            20,
            {"seq_length": 8},
            {"image_size": 100, "heads": 3},
        ),  # NTK 7; a strip at the edges is not looked at
        (60, {"seq_length": 90, "kv_channels": 32, "num_attention_heads": 4}, {"patch_size": 7}),
    ],
)
def test_configurations_that_no_checkpoint_has(
    hub_folder: Path, length: int, changes: dict[str, Any], visual: dict[str, Any]
) -> None:
    """Random weights through both programs: what the goldens' two shapes can't show."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads((hub_folder / "config.json").read_text())
    small = {"width": 60, "layers": 2, "heads": 2, "n_queries": 36} | visual
    config |= changes | {"visual": config["visual"] | small}
    (hub_folder / "config.json").write_text(json.dumps(config))
    for path in hub_folder.glob("model*safetensors*"):
        path.unlink()
    torch.manual_seed(0)
    auto = AutoConfig.from_pretrained(hub_folder, trust_remote_code=True)
    net = AutoModelForCausalLM.from_config(auto, trust_remote_code=True)
    with torch.no_grad():
        for weight in net.parameters():
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    mx.save_safetensors(
        str(hub_folder / "model.safetensors"), {k: mx.array(v.numpy()) for k, v in net.state_dict().items()}
    )
    model = load_model(hub_folder, "float32")
    size, start, slots = (
        config["visual"]["image_size"],
        config["visual"]["image_start_id"],
        small["n_queries"],
    )
    media = [Media("image", np.random.default_rng(0).integers(0, 256, (3, size, size), np.uint8), (1, 1, 1))]
    ids = np.random.default_rng(1).integers(300, 400, length).tolist()
    prompt = Prompt([*ids, start, *[0] * slots, start + 1, *ids], media)
    ours = verify.Ours.of(model, prompt, 3)
    theirs = run_hub_code(hub_folder, prompt, ours.places, ours.stages.tokens, "float32")
    rows = list(verify.compare(ours, theirs, "float32"))
    print(verify.table(rows))
    assert not any(row.failed for row in rows)


def golden_file(folder: Path, place: Path) -> Path:
    """The model's own numbers, as if a reference had given them."""
    model = load_model(folder, "float32")
    prompt = small_prompt(json.loads((folder / "config.json").read_text()))
    path = place / "golden.npz"
    parity.write_golden(path, prompt, run_mlx(model, prompt, 3))
    return path


def test_a_wrong_layer_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = reference("qwen2_vl/tiny-hub")
    golden = golden_file(folder, tmp_path)
    command = ["--model", str(folder), "--golden", str(golden)]
    assert verify.main(command) == 0
    with np.load(golden) as arrays:
        stored = dict(arrays)
    stored["states"][1, 3] += 0.1
    np.savez(golden, **stored)
    capsys.readouterr()
    assert verify.main(command) == 1
    lines = {line.split("  ")[0].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert lines["layer 1"].endswith("FAILED")
    assert lines["embeddings"].endswith("ok")


def test_a_quantised_model_is_judged_by_its_answers(tmp_path: Path) -> None:
    import mlx.nn as nn

    folder = reference("qwen2_vl/tiny-hub")
    prompt, theirs = parity.read_golden(golden_file(folder, tmp_path))
    model = load_model(folder, "float32")
    nn.quantize(model.language_model, group_size=32, bits=8)
    rows = list(verify.compare(verify.Ours.of(model, prompt, theirs.tokens), theirs, "float32"))
    assert [row.stage for row in rows if row.limit is not None] == ["features 1", "features 2", "divergence"]
    assert not any(row.failed for row in rows)


def test_not_a_number_fails() -> None:
    assert verify.Row("logits", float("nan"), 0.0, 1.0, 1e-3).failed


def test_taps_leave_no_trace() -> None:
    folder = reference("qwen2_vl/tiny-hub")
    model = load_model(folder, "float32")
    prompt = small_prompt(json.loads((folder / "config.json").read_text()))
    decoder = model.language_model.model
    before = [*decoder.layers, decoder.norm]
    with pytest.raises(PromptError), tapped(model):
        model.embed([1], [], prompt.media)
    assert all(now is then for now, then in zip([*decoder.layers, decoder.norm], before, strict=True))


def test_another_generation_is_refused_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    model, other = (str(reference(name)) for name in ("qwen2_vl/tiny-hub", "qwen3_vl/tiny"))
    assert verify.main(["--model", model, "--against", other]) == 1
    assert "--model is qwen2_vl but --against is qwen3_vl" in capsys.readouterr().err


def test_missing_torch_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    folder = str(reference("qwen2_vl/tiny-hub"))
    assert verify.main(["--model", folder, "--against", folder]) == 1
    assert "pip install torch" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"", b"no archive", b"PK\x03\x04 cut"])
def test_a_damaged_golden_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    path = tmp_path / "golden.npz"
    if content is not None:
        path.write_bytes(content)
    assert verify.main(["--model", str(tmp_path), "--golden", str(path)]) == 1
    assert str(path) in capsys.readouterr().err


def test_contradictions_are_wrong_usage(tmp_path: Path) -> None:
    for more in ([], ["--golden", "x.npz", "--prompt", "?"], ["--golden", "x.npz", "--against", "y"]):
        with pytest.raises(SystemExit, match="2"):
            verify.main(["--model", str(tmp_path), *more])
