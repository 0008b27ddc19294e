"""Conversion: exact where nothing is rounded, as loadable elsewhere, whole or not there at all."""

from __future__ import annotations

import errno
import hashlib
import json
import random
import resource
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers import HERE, reference
from safetensors import safe_open

from qwenvl_mlx import convert as package
from qwenvl_mlx.checkpoint import load_model, read, writing
from qwenvl_mlx.convert import folder, main
from qwenvl_mlx.convert.options import ConvertOptions, Settings, make_options
from qwenvl_mlx.convert.recipe import make_recipe
from qwenvl_mlx.engine.kv import kv_cost
from qwenvl_mlx.errors import ConfigError, HubError, OutputError
from qwenvl_mlx.media import Prompt

ORIGINAL = "qwen_vl/ckpt/tiny_chat"
IDS = [420, 13, 77, 5, 9, 200, 31]


def convert(source: Path, target: Path, *, q_report: str = "weights", **options: Any) -> Path:
    return package.convert(source, target, q_report=q_report, **options).folder  # type: ignore[no-any-return]


def command(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own."""
    line = [sys.executable, "-m", "qwenvl_mlx.convert", *map(str, arguments)]
    return subprocess.run(line, cwd=HERE.parent, capture_output=True, text=True, check=False, **options)


def digests(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}


def logits(path: Path) -> np.ndarray:
    return np.array(load_model(path, "float32").logits(Prompt(IDS)))[0]


def small_logits(path: Path) -> np.ndarray:
    """The same on ids that every tiny vocabulary has."""
    ids = [min(token, 200) for token in IDS]
    return np.array(load_model(path, "float32").logits(Prompt(ids)))[0]


def divergence(source: np.ndarray, other: np.ndarray) -> float:
    """Mean KL divergence of next-token distributions, in nats."""
    one, two = (mx.log(mx.softmax(mx.array(x), axis=-1)) for x in (source, other))
    return mx.mean(mx.sum(mx.exp(one) * (one - two), axis=-1)).item()


def config(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())  # type: ignore[no-any-return]


# ---- what is written


@pytest.mark.parametrize(
    "source",
    [
        f"{ORIGINAL}/bin_bf16",
        f"{ORIGINAL}/safetensors_fp32",
        "qwen2_vl/tiny-hub",
        "qwen2_vl/tiny-gptq-int4",
        "qwen3_vl/tiny",
        "qwen3_5/tiny",
    ],
)
def test_a_converted_checkpoint_is_the_same_model(tmp_path: Path, source: str) -> None:
    result = convert(reference(source), tmp_path / "m")
    np.testing.assert_array_equal(small_logits(result), small_logits(reference(source)))


def test_the_folder_is_the_one_that_other_mlx_programs_use(tmp_path: Path) -> None:
    result = convert(reference(f"{ORIGINAL}/bin_bf16"), tmp_path / "m", quantize=True)
    index = json.loads((result / "model.safetensors.index.json").read_text())
    with safe_open(result / "model-00001-of-00001.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "mlx"}
        assert set(file.keys()) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in read(result).values())
    assert config(result)["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"}
    assert config(result)["quantization_config"] == config(result)["quantization"]
    assert "auto_map" not in config(result)
    names = {"tokenizer.json", "qwen.tiktoken", "tokenizer_config.json", "generation_config.json"}
    assert names <= {path.name for path in result.iterdir()}


def test_it_equals_the_folder_that_another_converter_made(tmp_path: Path, shared: Path) -> None:
    result = convert(reference("qwen2_vl/tiny-hub"), tmp_path / "m", quantize=True, q_group_size=32)
    ours, theirs = read(result), read(shared / "mlx_folders" / "q2-4bit")
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"q_bits": 8}, 1e-3),
        ({"q_bits": 8, "q_vision": True}, 1e-3),
        ({"q_bits": 4}, 0.45),
        ({"q_bits": 4, "q_group_size": 32}, 0.36),
        ({"q_bits": 4, "q_group_size": 32, "q_recipe": "mixed"}, 0.18),
        ({"q_mode": "mxfp4"}, 0.75),
        ({"q_mode": "nvfp4"}, 0.58),
        ({"q_mode": "mxfp8"}, 0.04),
    ],
)
def test_quantising_costs_no_more_than_this(tmp_path: Path, options: dict[str, Any], bound: float) -> None:
    """Random weights are the hardest to quantise: trained ones lose less. Bounds: 1.3 times what was measured."""
    source = reference(f"{ORIGINAL}/safetensors_fp32")
    result = convert(source, tmp_path / "m", quantize=True, **options)
    cost = divergence(logits(source), logits(result))
    print(f"{options}: KL {cost:.5f} nats")
    assert cost < bound


@pytest.mark.parametrize("source", [f"{ORIGINAL}/safetensors_fp32", "qwen2_vl/tiny-hub"])
@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4", "mxfp8"])
def test_quantised_weights_compute_what_their_values_say(tmp_path: Path, source: str, mode: str) -> None:
    """In the type that was asked for: MLX looks embeddings of its floating point modes up in bfloat16."""
    quantised = convert(reference(source), tmp_path / "q", quantize=True, q_mode=mode)
    plain = convert(quantised, tmp_path / "d", dequantize=True, dtype="float32")
    np.testing.assert_allclose(*(small_logits(folder) for folder in (quantised, plain)), atol=1e-4)


def test_the_vision_tower_is_quantised_only_when_asked(tmp_path: Path) -> None:
    source = reference("qwen3_vl/tiny")
    plain = read(convert(source, tmp_path / "a", quantize=True, q_group_size=32))
    both = read(convert(source, tmp_path / "b", quantize=True, q_group_size=32, q_vision=True))
    assert not any(name.startswith("vision_tower") and name.endswith(".scales") for name in plain)
    assert any(name.startswith("vision_tower") and name.endswith(".scales") for name in both)
    assert config(tmp_path / "b")["quantization"]["vision_tower.merger.linear_fc2"]["bits"] == 8
    load_model(tmp_path / "b")


def test_dequantising_and_requantising_an_mlx_folder(tmp_path: Path) -> None:
    source = reference(f"{ORIGINAL}/bin_bf16")
    eight = convert(source, tmp_path / "8", quantize=True, q_bits=8)
    plain = convert(eight, tmp_path / "plain", dequantize=True)
    assert "quantization" not in config(plain)
    assert read(plain)["language_model.lm_head.weight"].dtype == mx.bfloat16
    assert divergence(logits(source), logits(plain)) < 4e-3
    four = convert(eight, tmp_path / "4", quantize=True, q_bits=4)
    assert config(four)["quantization"]["bits"] == 4
    again = convert(four, tmp_path / "again")
    assert (
        digests(again)["model-00001-of-00001.safetensors"]
        == digests(four)["model-00001-of-00001.safetensors"]
    )


def test_an_exact_mapping_is_kept_unless_other_settings_are_asked_for(tmp_path: Path) -> None:
    source = reference("qwen2_vl/tiny-gptq-int4")
    kept = convert(source, tmp_path / "kept", quantize=True, q_bits=4, q_group_size=64)
    name = "language_model.model.layers.0.mlp.up_proj.scales"
    assert mx.array_equal(read(kept)[name], read(source)["model.layers.0.mlp.up_proj.scales"].T)
    other = convert(source, tmp_path / "other", quantize=True, q_bits=8)
    assert config(other)["quantization"]["bits"] == 8


def test_the_result_does_not_depend_on_the_shards(tmp_path: Path) -> None:
    one = convert(reference(f"{ORIGINAL}/safetensors_fp32"), tmp_path / "1", dtype="bfloat16", quantize=True)
    two = convert(reference(f"{ORIGINAL}/bin_bf16"), tmp_path / "2", quantize=True)
    weights = "model-00001-of-00001.safetensors"
    assert digests(one)[weights] == digests(two)[weights]


@pytest.mark.parametrize(
    "source", ["qwen2_vl/tiny-hub", "qwen2_vl/tiny-gptq-int4", "qwen3_vl/tiny", "qwen3_5/tiny"]
)
def test_the_result_does_not_depend_on_the_kind_of_files(tmp_path: Path, source: str) -> None:
    """Torch files are read module by module: what a generation does to names and shapes must hold for each alone."""
    folder = reference(source)
    bins = tmp_path / "bins"
    bins.mkdir()
    tensors = {name: torch.from_dlpack(array) for name, array in read(folder).items()}
    torch.save(tensors, bins / "pytorch_model.bin")
    shutil.copy(folder / "config.json", bins)
    weights = "model-00001-of-00001.safetensors"
    assert (
        digests(convert(bins, tmp_path / "1"))[weights] == digests(convert(folder, tmp_path / "2"))[weights]
    )


def test_shards_are_cut_at_their_limit(tmp_path: Path) -> None:
    arrays = {f"t{n}": mx.full((100,), n, mx.float32) for n in range(5)}
    outlines = {name: writing.Outline(array.shape, array.dtype) for name, array in arrays.items()}
    paths = writing.write_shards(tmp_path, outlines, arrays.__getitem__, shard_bytes=800)
    assert [path.name for path in paths] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert all(mx.array_equal(array, arrays[name]) for name, array in read(tmp_path).items())


def test_checksums_of_the_inputs_are_recorded(tmp_path: Path) -> None:
    source = reference(f"{ORIGINAL}/bin_bf16")
    result = convert(source, tmp_path / "m")
    recorded = json.loads((result / "qwenvl_mlx.json").read_text())["sha256"]
    assert recorded.items() <= digests(source).items()
    assert len(recorded) == 3


# ---- what is told about the result


def test_the_report_says_what_quantising_cost(tmp_path: Path) -> None:
    source = reference(f"{ORIGINAL}/bin_bf16")
    eight = json.loads(
        (
            convert(source, tmp_path / "8", quantize=True, q_bits=8, q_report="auto") / "quality.json"
        ).read_text()
    )
    four = json.loads(
        (convert(source, tmp_path / "4", quantize=True, q_report="auto") / "quality.json").read_text()
    )
    assert eight["behaviour"]["prompts"] == 6, "four texts and two pictures"
    assert eight["behaviour"]["kl_divergence"] < four["behaviour"]["kl_divergence"]
    assert eight["behaviour"]["top1_agreement"] > four["behaviour"]["top1_agreement"]
    assert set(four["modules"]) == {
        name.removesuffix(".scales") for name in read(tmp_path / "4") if "scales" in name
    }
    assert four["weight_bytes"] == sum(array.nbytes for array in read(tmp_path / "4").values())
    assert four["weight_bytes"] < eight["weight_bytes"] < four["expected_memory_bytes"]


@pytest.mark.parametrize(
    ("source", "options", "most"),
    [
        ("qwen2_vl/tiny-hub", [], None),
        ("qwen2_vl/tiny-hub", ["--dtype", "float16"], 1e-4),
        ("qwen2_vl/tiny-gptq-int4", [], 0),
        ("qwen2_vl/tiny-gptq-int4", ["-d"], 1e-4),
        ("qwen2_vl/tiny-gptq-int4", ["-q", "--q-bits", "8", "--q-group-size", "32"], 0.005),
        ("qwen3_vl/tiny-fp8", [], 1e-3),
        ("qwen3_vl/tiny-fp8", ["--q-vision"], 2e-3),
    ],
)
def test_every_conversion_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, options: list[str], most: float | None
) -> None:
    """Bounds: the divergence, None where no value changes and none is measured."""
    assert main(["--hf-path", str(reference(source)), "--mlx-path", str(tmp_path / "m"), *options]) == 0
    told = capsys.readouterr().out
    assert "size of the weights" in told
    assert "memory with 4096 tokens" in told
    behaviour = json.loads((tmp_path / "m" / "quality.json").read_text())["behaviour"]
    assert ("KL divergence" in told) == (behaviour is not None) == (most is not None)
    if behaviour:
        assert 0 <= behaviour["kl_divergence"] <= most


@pytest.mark.parametrize("source", ["qwen2_vl/tiny-gptq-int4", "qwen3_5/tiny", f"{ORIGINAL}/bin_bf16"])
@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}, {"quantize": True, "q_group_size": 32}])
def test_the_expected_memory_is_what_the_loaded_model_takes(
    tmp_path: Path, source: str, options: dict[str, Any]
) -> None:
    result = convert(reference(source), tmp_path / "m", **options)
    report = json.loads((result / "quality.json").read_text())
    cost = kv_cost(load_model(result), None)
    assert report["expected_memory_bytes"] == report["weight_bytes"] + 4096 * cost.token + cost.fixed


def test_the_errors_in_the_report_are_those_of_the_weights(tmp_path: Path) -> None:
    source = reference("qwen2_vl/tiny-hub")
    result = convert(source, tmp_path / "m", quantize=True, q_group_size=32)
    reported = json.loads((result / "quality.json").read_text())["modules"]
    name = "language_model.model.layers.0.mlp.down_proj"
    weights = read(result)
    ours = mx.dequantize(*(weights[f"{name}.{kind}"].astype(dtype) for kind, dtype in
                           (("weight", mx.uint32), ("scales", mx.float32), ("biases", mx.float32))), 32, 4)  # fmt: skip
    exact = read(source)["model.layers.0.mlp.down_proj.weight"].astype(mx.float32)
    error = mx.linalg.norm(ours - exact) / mx.linalg.norm(exact)
    assert reported[name]["relative_error"] == pytest.approx(error.item(), rel=1e-3)


def test_large_sources_are_loaded_for_the_report_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwenvl_mlx.convert.quality.SMALL_SOURCE", 1000)
    source = reference(f"{ORIGINAL}/bin_bf16")
    report = json.loads(
        (convert(source, tmp_path / "m", quantize=True, q_report="auto") / "quality.json").read_text()
    )
    assert report["behaviour"] is None
    assert "--q-report full" in report["note"]
    assert report["modules"]


def test_the_card_names_the_base_model_and_carries_the_licence_over(tmp_path: Path) -> None:
    source = Path(shutil.copytree(reference(f"{ORIGINAL}/bin_bf16"), tmp_path / "Qwen-VL-Chat"))
    (source / "README.md").write_text(
        "---\nlicense: other\nlicense_name: tongyi-qianwen\nlicense_link: LICENSE\nlanguage: [zh, en]\n"
        "base_model: Qwen/Qwen-VL\n---\nText of the source.\n"
    )
    (source / "LICENSE").write_text("Terms.")
    result = convert(source, tmp_path / "m", quantize=True, q_report="full")
    text = (result / "README.md").read_text()
    for line in (
        "license: other",
        "license_name: tongyi-qianwen",
        "base_model: Qwen/Qwen-VL",
        "library_name: mlx",
    ):
        assert f"\n{line}\n" in text
    assert "KL divergence" in text
    assert "Text of the source" not in text
    assert (result / "LICENSE").read_text() == "Terms."


def test_a_card_that_can_not_be_read_is_no_obstacle(tmp_path: Path) -> None:
    source = Path(shutil.copytree(reference(f"{ORIGINAL}/bin_bf16"), tmp_path / "s"))
    (source / "README.md").write_text("---\nlicense: [\n---\n")
    assert (convert(source, tmp_path / "m") / "README.md").exists()


def test_an_upload_that_fails_leaves_the_folder(tmp_path: Path) -> None:
    """HF_HUB_OFFLINE is set in the tests."""
    with pytest.raises(HubError, match="only the upload failed"):
        convert(reference(f"{ORIGINAL}/bin_bf16"), tmp_path / "m", upload_repo="me/mine")
    load_model(tmp_path / "m")


# ---- recipes


MODULES = {
    **{f"language_model.model.layers.{n}.mlp.{kind}_proj": 256 for n in range(16) for kind in ("up", "down")},
    "language_model.model.layers.8.mlp.gate": 256,
    "language_model.model.embed_tokens": 256,
    "language_model.lm_head": 256,
    "language_model.model.layers.8.odd": 100,
    "vision_tower.blocks.0.mlp.fc1": 160,
    "vision_tower.blocks.0.mlp.fc2": 100,
}


def bits_of(**options: Any) -> dict[str, int]:
    recipe = make_recipe(MODULES, make_options(quantize=True, **options))
    return {path.removeprefix("language_model."): settings.bits for path, settings in recipe.items()}


def test_routers_and_odd_sizes_have_their_own_rules() -> None:
    bits = bits_of(q_bits=4)
    assert bits["model.layers.8.mlp.gate"] == 8
    assert "model.layers.8.odd" not in bits
    assert set(bits.values()) == {4, 8}
    assert not any(path.startswith("vision") for path in bits)


def test_mixed_recipes_spend_bits_where_they_matter() -> None:
    for name, high in (("mixed", 8), ("mixed_6", 6)):
        bits = bits_of(q_recipe=name)
        assert {bits["lm_head"], bits["model.layers.0.mlp.up_proj"], bits["model.layers.15.mlp.up_proj"]} == {
            high
        }
        assert bits["model.layers.8.mlp.down_proj"] == high
        assert bits["model.layers.8.mlp.up_proj"] == bits["model.embed_tokens"] == 4


def test_vision_layers_take_the_largest_group_that_divides_them() -> None:
    recipe = make_recipe(MODULES, make_options(q_vision=8))
    assert recipe == {"vision_tower.blocks.0.mlp.fc1": Settings(8, 32)}


@pytest.mark.parametrize(
    "options",
    [
        {"quantize": True, "dequantize": True},
        {"quantize": True, "q_mode": "nvfp4", "q_group_size": 64},
        {"quantize": True, "q_bits": 5},
        {"quantize": True, "q_group_size": 48},
        {"q_recipe": "best"},
        {"dtype": "int8"},
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        make_options(**options)


def test_modes_bring_their_own_sizes() -> None:
    assert make_options(quantize=True, q_mode="nvfp4") == ConvertOptions(Settings(4, 16, "nvfp4"))


# ---- bad input and bad moments, through the command


def test_the_command_converts_and_says_where(tmp_path: Path) -> None:
    done = command(
        "--hf-path", reference(f"{ORIGINAL}/bin_bf16"), "--mlx-path", tmp_path / "m", "-q", "--q-vision"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == str(tmp_path / "m")


def fails(*arguments: Any) -> str:
    """The one line that a failing command prints; exit code 1, no traceback."""
    done = command(*arguments)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_an_existing_output_folder_is_refused(tmp_path: Path) -> None:
    message = fails("--hf-path", reference(f"{ORIGINAL}/bin_bf16"), "--mlx-path", tmp_path)
    assert f"{tmp_path} exists: pass another --mlx-path" in message


def test_a_missing_model_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "Qwen-VL-Chat").mkdir()
    message = fails("--hf-path", tmp_path / "Qwen-VL-Chta", "--mlx-path", tmp_path / "m")
    assert f"close to it: {tmp_path / 'Qwen-VL-Chat'}" in message


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "model_type 'llama'" in fails("--hf-path", tmp_path, "--mlx-path", tmp_path / "m")


def test_half_a_checkpoint_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = tmp_path / "half"
    source.mkdir()
    for path in reference(f"{ORIGINAL}/bin_bf16").iterdir():
        if "00002-of" not in path.name:
            (source / path.name).write_bytes(path.read_bytes())
    assert "1 of 2 files" in fails("--hf-path", source, "--mlx-path", tmp_path / "m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half"]


def test_wrong_usage_is_exit_code_2() -> None:
    assert command("--hf-path", "x", "-q", "-d").returncode == 2
    assert command("--hf-path", "x", "--q-bits", "5").returncode == 2
    assert command().returncode == 2


def test_an_unwritable_place_is_refused() -> None:
    message = fails("--hf-path", reference(f"{ORIGINAL}/bin_bf16"), "--mlx-path", "/proc/nowhere/m")
    assert "/proc/nowhere can't be made" in message


def test_too_little_space_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"0\.00 GB free, the result needs 0\.07 GB"):
        convert(reference(f"{ORIGINAL}/bin_bf16"), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))

    def full(*_: Any, **__: Any) -> None:
        if next(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing.os, "fsync", full)
    with pytest.raises(OutputError, match="no space left"):
        convert(reference(f"{ORIGINAL}/bin_bf16"), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_file_that_the_system_refuses_to_let_grow_leaves_nothing(tmp_path: Path) -> None:
    """A limit on file sizes, through the command: as near to a full disk as a test may come."""
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000))
    done = command(
        "--hf-path", reference(f"{ORIGINAL}/bin_bf16"), "--mlx-path", tmp_path / "m", preexec_fn=limit
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "pass another --mlx-path" in done.stderr
    assert not list(tmp_path.iterdir())


def test_two_conversions_into_one_folder_do_not_mix(tmp_path: Path) -> None:
    with (
        folder.finished_folder(tmp_path / "m"),
        pytest.raises(OutputError, match="another process"),
        folder.finished_folder(tmp_path / "m"),
    ):
        pass


def test_ctrl_c_leaves_nothing_and_is_exit_code_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qwenvl_mlx.convert.run.write_shards", interrupt)
    arguments = ["--hf-path", str(reference(f"{ORIGINAL}/bin_bf16")), "--mlx-path", str(tmp_path / "m")]
    assert main(arguments) == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_kill_at_random_moments_then_run_again(tmp_path: Path) -> None:
    """Ten times kill -9 while it writes: what has the final name is whole, and the next run gives the same bytes."""
    arguments = ["--hf-path", reference(f"{ORIGINAL}/bin_bf16"), "-q", "--q-group-size", 32]
    quiet, target = tmp_path / "quiet", tmp_path / "m"
    assert command(*arguments, "--mlx-path", quiet).returncode == 0
    line = [sys.executable, "-m", "qwenvl_mlx.convert", *map(str, arguments), "--mlx-path", str(target)]
    lock = tmp_path / ".m.partial.lock"
    duration, moments, interrupted = 0.0, random.Random(0), 0
    for attempt in range(11):  # the first runs to its end, to see how long that takes
        with subprocess.Popen(
            line, cwd=HERE.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            while not lock.exists():
                time.sleep(0.001)
            begin = time.monotonic()
            if attempt:
                time.sleep(moments.uniform(0, duration))
                process.kill()
            else:
                while lock.exists():
                    time.sleep(0.001)
                duration = time.monotonic() - begin
        if target.exists():
            assert digests(target) == digests(quiet)
            shutil.rmtree(target)
        else:
            interrupted += 1
    assert interrupted, "every run had ended before it was killed: choose other moments"
    assert command(*arguments, "--mlx-path", target).returncode == 0
    assert digests(target) == digests(quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "quiet"]
