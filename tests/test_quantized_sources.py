"""GPTQ, AWQ and FP8 checkpoints: exact to the last bit in MLX's form, logits as the reference's."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from golden import Case
from helpers import reference
from mlx.utils import tree_flatten

from qwenvl_mlx.checkpoint import load_model, read
from qwenvl_mlx.checkpoint.quantized import unpack
from qwenvl_mlx.convert.__main__ import main
from qwenvl_mlx.errors import CheckpointError, ConfigError
from qwenvl_mlx.media import Prompt

TOLERANCE = 1e-3  # float32 logits; measured 1e-5: the weights are equal, only sums are in another order


def gptq(bits: int, **more: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "gptq", "bits": bits, **more}}


AWQ = {"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemm"}}


def fp8(block: list[int] | None) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}}


def exact(weights: dict[str, mx.array], module: str, bits: int = 4) -> np.ndarray:
    """The module's weights ``[out, in]``, MLX's formula in float64."""
    packed, scales, biases = (
        np.array(weights[f"{module}.{kind}"]) for kind in ("weight", "scales", "biases")
    )
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    numbers = ((packed[..., None] >> shifts) & (2**bits - 1)).reshape(len(packed), -1)
    group = numbers.shape[1] // scales.shape[1]
    return np.repeat(scales.astype(np.float64), group, 1) * numbers + np.repeat(
        biases.astype(np.float64), group, 1
    )


def pack_words(numbers: np.ndarray, bits: int, axis: int, order: tuple[int, ...] | None = None) -> mx.array:
    """Numbers packed along an axis into int32 words, as the quantisers' own code does."""
    numbers = np.moveaxis(numbers.astype(np.uint32), axis, -1)
    fields = numbers.reshape(*numbers.shape[:-1], -1, 32 // bits)
    if order:
        fields = fields[..., list(order)]
    words = (fields << np.arange(0, 32, bits, dtype=np.uint32)).sum(-1, dtype=np.uint32)
    return mx.array(np.moveaxis(words, -1, axis).view(np.int32))


def gptq_module(
    bits: int, *, symmetric: bool, group: int = 64, v1: bool = True
) -> tuple[dict[str, mx.array], np.ndarray]:
    """A random module and the exact weights ``[out, in]`` that the reference formula gives."""
    random = np.random.default_rng(bits)
    inputs, outputs = 256, 32
    numbers = random.integers(0, 2**bits, (inputs, outputs))
    scales = random.uniform(1e-3, 1e-2, (inputs // group, outputs)).astype(np.float16)
    zeros = (
        random.integers(1, 2**bits, scales.shape) if not symmetric else np.full(scales.shape, 2 ** (bits - 1))
    )
    rows = np.arange(inputs) // group
    weights = {
        "m.qweight": pack_words(numbers, bits, 0),
        "m.qzeros": pack_words(zeros - v1, bits, 1),
        "m.scales": mx.array(scales),
        "m.g_idx": mx.array(rows.astype(np.int32)),
    }
    return weights, (scales[rows].astype(np.float64) * (numbers - zeros[rows])).T


# ---- numbers


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_gptq_becomes_affine_without_any_rounding(bits: int, symmetric: bool, group: int) -> None:
    source, expected = gptq_module(bits, symmetric=symmetric, group=group)
    weights = unpack(source, gptq(bits))
    assert weights.keys() == {"m.weight", "m.scales", "m.biases"}
    assert weights["m.scales"].dtype == (mx.float16 if symmetric else mx.float32)
    np.testing.assert_array_equal(exact(weights, "m", bits), expected)


def test_mlx_dequantises_them_to_the_same_numbers() -> None:
    source, expected = gptq_module(4, symmetric=False)
    weights = unpack(source, gptq(4))
    ours = mx.dequantize(weights["m.weight"], weights["m.scales"], weights["m.biases"], 64, 4)
    np.testing.assert_array_equal(np.array(ours), expected.astype(np.float32))


def test_gptq_zeros_of_the_second_version_are_not_shifted() -> None:
    source, expected = gptq_module(4, symmetric=False, v1=False)
    np.testing.assert_array_equal(exact(unpack(source, gptq(4, checkpoint_format="gptq_v2")), "m"), expected)


def test_one_group_for_a_whole_column_is_repeated_for_mlx() -> None:
    source, expected = gptq_module(4, symmetric=True, group=256)
    weights = unpack(source, gptq(4, group_size=-1))
    assert weights["m.scales"].shape == (32, 2)
    np.testing.assert_array_equal(exact(weights, "m"), expected)


def test_reordered_groups_are_dequantised_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    source, _ = gptq_module(4, symmetric=False)
    numbers = np.array(source["m.qweight"]).view(np.uint32)
    order = np.random.default_rng(1).permutation(256) // 64
    source["m.g_idx"] = mx.array(order.astype(np.int32))
    with caplog.at_level(logging.WARNING):
        weights = unpack(source, gptq(4), mx.float32)
    assert "groups of weights that MLX has no form for" in caplog.text
    unpacked = ((numbers[:, None] >> (4 * np.arange(8, dtype=np.uint32))[:, None]) & 15).reshape(256, 32)
    zeros = (
        (np.array(source["m.qzeros"]).view(np.uint32)[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & 15
    ) + 1
    expected = np.array(source["m.scales"]).astype(np.float32)[order] * (
        unpacked.astype(np.int64) - zeros.reshape(4, 32)[order]
    )
    np.testing.assert_array_equal(np.array(weights["m.weight"]), expected.T.astype(np.float32))


def test_awq_becomes_affine_without_any_rounding() -> None:
    random = np.random.default_rng(0)
    numbers, zeros = random.integers(0, 16, (256, 64)), random.integers(0, 16, (4, 64))
    scales = random.uniform(1e-3, 1e-2, (4, 64)).astype(np.float16)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    source = {
        "m.qweight": pack_words(numbers, 4, 1, order),
        "m.qzeros": pack_words(zeros, 4, 1, order),
        "m.scales": mx.array(scales),
    }
    rows = np.arange(256) // 64
    expected = (scales[rows].astype(np.float64) * (numbers - zeros[rows])).T
    np.testing.assert_array_equal(exact(unpack(source, AWQ), "m"), expected)


@pytest.mark.parametrize("shape", [(256, 256), (200, 256), (256, 300), (130, 130), (3, 130, 300)])
def test_fp8_blocks_scale_their_weights_also_at_the_edges(shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    weight = mx.to_fp8(mx.array(random.normal(size=shape).astype(np.float32)))
    blocks = (*shape[:-2], *(-(-size // 128) for size in shape[-2:]))
    scales = random.uniform(0.1, 2, blocks).astype(np.float32)
    weights = unpack(
        {"m.weight": weight, "m.weight_scale_inv": mx.array(scales)}, fp8([128, 128]), mx.float32
    )
    grown = np.repeat(np.repeat(scales, 128, -2), 128, -1)[..., : shape[-2], : shape[-1]]
    np.testing.assert_array_equal(
        np.array(weights["m.weight"]), np.array(mx.from_fp8(weight, mx.float32)) * grown
    )
    assert (
        unpack({"m.weight": weight, "m.weight_scale_inv": mx.array(scales)}, fp8([128, 128]))[
            "m.weight"
        ].dtype
        == mx.bfloat16
    )


@pytest.mark.parametrize("case", ["sym_256x64", "asym_128x32"])
def test_the_original_quantisers_own_packing(case: str) -> None:
    golden = np.load(reference("qwen_vl/goldens/gptq_linear.npz"))
    source = {
        f"m.{part}": mx.array(golden[f"{case}/{part}"]) for part in ("qweight", "qzeros", "scales", "g_idx")
    }
    weights = exact(unpack(source, gptq(4)), "m")
    np.testing.assert_array_equal(weights.T[::4].astype(np.float32), golden[f"{case}/W_dequant_in_out_f32"])
    result = golden[f"{case}/x"] @ weights.T + golden[f"{case}/bias"]
    np.testing.assert_allclose(result, golden[f"{case}/y_f32"], atol=1e-4)


# ---- models

KINDS = [
    ("qwen2_vl", "gptq-int4", "tiny-gptq-int4"),
    ("qwen2_5_vl", "awq", "tiny-awq"),
    ("qwen3_vl", "fp8", "tiny-fp8"),
]


@pytest.mark.parametrize(("generation", "kind", "folder"), KINDS)
def test_dequantised_matrices_equal_the_goldens(generation: str, kind: str, folder: str) -> None:
    golden = np.load(reference(f"{generation}/goldens/{kind}.npz"))
    path = reference(f"{generation}/{folder}")
    weights = unpack(read(path), json.loads((path / "config.json").read_text()), mx.float32)
    for key in [key for key in golden if key.startswith("dequant/")]:
        name = key.removeprefix("dequant/")
        module = name.removesuffix(".weight")
        ours = exact(weights, module) if f"{module}.scales" in weights else np.array(weights[name])
        np.testing.assert_array_equal(ours.astype(np.float32), golden[key], err_msg=name)


@pytest.mark.parametrize(("generation", "kind", "folder"), KINDS)
def test_logits_and_greedy_tokens_equal_the_goldens(generation: str, kind: str, folder: str) -> None:
    case = Case.load(generation, kind)
    model = load_model(reference(f"{generation}/{folder}"), "float32")
    prompt = case.prompts(model)[0]  # type: ignore[arg-type]
    logits = np.array(model.logits(prompt))[0, -12:]
    np.testing.assert_allclose(logits, case["logits"][0], atol=TOLERANCE)
    assert int(logits[-1].argmax()) == int(case["greedy"][0, 0])


@pytest.mark.parametrize(
    ("generation", "kind", "folder", "file", "keys"),
    [
        ("qwen2_vl", "gptq-int4", "tiny-gptq-int4", "quantize_config.json", {}),
        (
            "qwen2_5_vl",
            "awq",
            "tiny-awq",
            "quant_config.json",
            {"bits": "w_bit", "group_size": "q_group_size"},
        ),
    ],
)
def test_settings_in_the_quantisers_own_file(
    generation: str, kind: str, folder: str, file: str, keys: dict[str, str], tmp_path: Path
) -> None:
    """As AutoGPTQ and AutoAWQ write them, with nothing about it in config.json."""
    source = shutil.copytree(reference(f"{generation}/{folder}"), tmp_path / "source")
    source.chmod(0o755)
    config = json.loads((source / "config.json").read_text())
    settings = {keys.get(key, key): value for key, value in config.pop("quantization_config").items()}
    del settings["quant_method"]
    (source / "config.json").unlink()
    (source / "config.json").write_text(json.dumps(config))
    (source / file).write_text(json.dumps(settings))
    case = Case.load(generation, kind)
    assert main(["--hf-path", str(source), "--mlx-path", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    for path in (source, tmp_path / "out"):
        model = load_model(path, "float32")
        logits = np.array(model.logits(case.prompts(model)[0]))[0, -12:]  # type: ignore[arg-type]
        np.testing.assert_allclose(logits, case["logits"][0], atol=TOLERANCE)
    assert not (tmp_path / "out" / file).exists()


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_exact_scales_leave_a_half_precision_model_its_type(dtype: str | None) -> None:
    """AWQ's ``scale * zero`` needs float32; the activations and the KV cache of a float16 model do not."""
    case = Case.load("qwen2_5_vl", "awq")
    model = load_model(reference("qwen2_5_vl/tiny-awq"), dtype)
    parameters = dict(tree_flatten(model.parameters()))
    assert parameters["language_model.model.norm.weight"].dtype == mx.float16
    scales = [array for name, array in parameters.items() if name.endswith(".scales")]
    assert {array.dtype for array in scales} == {mx.float32}
    prompt, cache = case.prompts(model)[0], model.make_cache()  # type: ignore[arg-type]
    embedded = model.embed(prompt.input_ids, model.encode(prompt.media), prompt.media)
    logits = model(embedded, cache)
    assert {array.dtype for layer in cache for array in (layer.keys, layer.values)} == {mx.float16}
    ours = np.array(logits.astype(mx.float32))[0, -12:]
    np.testing.assert_allclose(ours, case["logits"][0], atol=0.05)


@pytest.mark.parametrize("source", ["qwen3_5/tiny", "qwen3_5_moe/tiny-hub", "qwen3_vl_moe/tiny-hub"])
def test_wide_scales_widen_no_kind_of_layer(source: str, tmp_path: Path) -> None:
    """Gated attention, delta nets and experts."""
    options = ["-q", "--q-group-size", "32", "--dtype", "float16", "--q-report", "weights"]
    assert main(["--hf-path", str(reference(source)), "--mlx-path", str(tmp_path / "mlx"), *options]) == 0
    wide = {
        name: array.astype(mx.float32)
        if ".layers." in name and name.endswith(("scales", "biases"))
        else array
        for name, array in read(tmp_path / "mlx").items()
    }
    mx.save_safetensors(str(tmp_path / "mlx" / "model-00001-of-00001.safetensors"), wide)
    model = load_model(tmp_path / "mlx")
    cache = model.make_cache()
    model.decode(mx.array([[40]]), cache)
    arrays = [array for layer in cache for array in (getattr(layer, "cache", None) or (layer.keys,))[:1]]
    assert {array.dtype for array in arrays} == {mx.float16}


def test_the_original_int4_model(tmp_path: Path) -> None:
    """GPTQ decoder blocks, with everything else (and biases of zeros on four of five layers) in half precision."""
    int4, plain = reference("qwen_vl/ckpt/tiny_hd128_int4"), reference("qwen_vl/ckpt/tiny_hd128")
    blocks = read(int4)
    rest = {name: array for name, array in read(plain).items() if not name.startswith("transformer.h.")}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {**rest, **blocks})
    shutil.copy(int4 / "config.json", tmp_path)
    model = load_model(tmp_path, "float32")
    names = dict(tree_flatten(model.parameters()))
    assert not any(name.endswith(("mlp.w1.bias", "mlp.c_proj.bias")) and "language" in name for name in names)
    golden = np.load(reference("qwen_vl/goldens/model_tiny_hd128_int4.npz"))
    logits = np.array(model.logits(Prompt(golden["text/ids"][0].tolist())))[:, -4:]
    np.testing.assert_allclose(logits, golden["text/logits_last4"], atol=TOLERANCE)


def test_quantising_anew_rounds_once(tmp_path: Path) -> None:
    """FP8 values times their scales need more bits than bfloat16 has: it is those that are quantised."""
    source = reference("qwen3_vl/tiny-fp8")
    options = ["-q", "--q-bits", "8", "--q-group-size", "32", "--q-report", "weights"]
    assert main(["--hf-path", str(source), "--mlx-path", str(tmp_path / "mlx"), *options]) == 0
    original = unpack(read(source), json.loads((source / "config.json").read_text()), mx.float32)
    result = read(tmp_path / "mlx")
    module = "layers.1.mlp.down_proj"
    packed, scales, biases = mx.quantize(original[f"model.language_model.{module}.weight"], 32, 8)
    expected = {"weight": packed, "scales": scales.astype(mx.bfloat16), "biases": biases.astype(mx.bfloat16)}
    for kind, array in expected.items():
        assert mx.array_equal(result[f"language_model.model.{module}.{kind}"], array), kind


# ---- defects


def test_a_bias_that_is_not_zero_is_not_dropped(tmp_path: Path) -> None:
    int4, plain = reference("qwen_vl/ckpt/tiny_hd128_int4"), reference("qwen_vl/ckpt/tiny_hd128")
    weights = {
        name: array for name, array in read(plain).items() if not name.startswith("transformer.h.")
    } | read(int4)
    name = "transformer.h.0.mlp.w1.bias"
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights | {name: weights[name] + 1})
    shutil.copy(int4 / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"1 unknown: .*mlp\.w1\.bias"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "bitsandbytes"},
        {"quant_method": "gptq", "bits": 3},
        {"quant_method": "awq", "bits": 4, "version": "gemv"},
    ],
)
def test_methods_that_are_not_known_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"is not known; known:"):
        unpack({}, {"quantization_config": settings})


def test_packed_weights_without_settings_are_told_what_they_need() -> None:
    source, _ = gptq_module(4, symmetric=True)
    with pytest.raises(CheckpointError, match=r"quantization_config, or the folder quantize_config\.json"):
        unpack(source, {})


def test_parts_that_do_not_fit_are_named() -> None:
    source, _ = gptq_module(4, symmetric=True)
    with pytest.raises(CheckpointError, match=r"m\.qzeros is missing"):
        unpack({name: array for name, array in source.items() if name != "m.qzeros"}, gptq(4))
    with pytest.raises(CheckpointError, match="m: qweight, qzeros and scales do not fit"):
        unpack(source | {"m.scales": source["m.scales"][:, :5]}, gptq(4))
    with pytest.raises(CheckpointError, match=r"m\.g_idx names groups"):
        unpack(source | {"m.g_idx": source["m.g_idx"] + 3}, gptq(4))
    scales = mx.ones((3, 3))
    with pytest.raises(CheckpointError, match="FP8 scales do not fit"):
        unpack({"m.weight": mx.zeros((8, 8), mx.uint8), "m.weight_scale_inv": scales}, fp8([128, 128]))
