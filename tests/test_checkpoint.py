"""Reading weights: every layout that people hold is read exactly, every defect is one error that names it."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from helpers import reference
from mlx.utils import tree_flatten

from qwenvl_mlx.checkpoint import load_model, open_checkpoint, read
from qwenvl_mlx.checkpoint.files import find_weights, read_config
from qwenvl_mlx.errors import CheckpointError, ConfigError


def save_torch(folder: Path, tensors: Any, name: str = "pytorch_model.bin", **options: Any) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / name, **options)
    return folder


def save_safetensors(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def as_numpy(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)


def copied(path: str, target: Path) -> Path:
    return Path(shutil.copytree(reference(path), target))


# ---- values


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "float32", "int64", "int32", "int16", "int8", "uint8", "bool"]
)
def test_torch_values_of_every_type_are_read_exactly(tmp_path: Path, dtype: str) -> None:
    values = torch.randn(7, 5).mul(20).to(getattr(torch, dtype))
    array = read(save_torch(tmp_path, {"a.weight": values}))["a.weight"]
    assert array.dtype == getattr(mx, {"bool": "bool_"}.get(dtype, dtype))
    expected = values.float().numpy() if dtype == "bfloat16" else values.numpy()
    np.testing.assert_array_equal(as_numpy(array), expected)


def test_float64_becomes_float32_because_no_gpu_has_it(tmp_path: Path) -> None:
    values = torch.randn(4, 3, dtype=torch.float64)
    array = read(save_torch(tmp_path, {"a": values}))["a"]
    assert array.dtype == mx.float32
    np.testing.assert_array_equal(np.array(array), values.numpy().astype(np.float32))


def test_strides_offsets_and_shared_storages_are_followed(tmp_path: Path) -> None:
    base = torch.arange(120, dtype=torch.float32).reshape(4, 5, 6)
    views = {
        "transposed": base.permute(2, 0, 1),
        "slice": base[1:3, ::2, 1:4],
        "tail": base[2:],
        "scalar": base[3, 4, 5],
        "empty": base[:0],
        "one": base[:1, :1, :1].transpose(0, 2),
        "parameter": torch.nn.Parameter(base[0]),
    }
    arrays = read(save_torch(tmp_path, OrderedDict(views)))
    for name, view in views.items():
        np.testing.assert_array_equal(np.array(arrays[name]), view.detach().numpy(), err_msg=name)
    file = tmp_path / "pytorch_model.bin"
    assert file.stat().st_size < 2 * base.nbytes + 4000, (
        "the storage is shared in the file, or this test tests nothing"
    )


def test_the_state_dict_of_a_module_with_version_numbers_is_read(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    state = module.state_dict()
    assert hasattr(state, "_metadata")
    arrays = read(save_torch(tmp_path, state))
    assert arrays.keys() == state.keys()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_is_read(tmp_path: Path, protocol: int) -> None:
    arrays = read(save_torch(tmp_path, {"a": torch.ones(3)}, pickle_protocol=protocol))
    np.testing.assert_array_equal(np.array(arrays["a"]), np.ones(3, np.float32))


def test_bin_and_safetensors_of_one_model_are_equal() -> None:
    root = reference("qwen_vl/ckpt/tiny_chat")
    one, other = read(root / "safetensors_fp32"), read(root / "bin_bf16")
    assert one.keys() == other.keys()
    assert all(mx.array_equal(one[name].astype(mx.bfloat16), other[name]) for name in one)


def test_safetensors_arrays_are_lazy(tmp_path: Path) -> None:
    """256 MB of weights are opened without being read: the file is sparse, the memory stays."""
    size = 1 << 28
    save_safetensors(
        tmp_path / "model.safetensors",
        {"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}},
        b"",
    )
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) + size)
    mx.reset_peak_memory()
    array = read(tmp_path)["a"]
    assert array.shape == (size,)
    assert mx.get_peak_memory() < size // 2


def test_torch_files_are_read_one_module_at_a_time(tmp_path: Path) -> None:
    """What bounds the memory of a conversion."""
    names = ("h.0.attn.weight", "h.0.attn.bias", "h.1.attn.weight", "lm_head.weight")
    names += ("m.experts.0.up.weight", "m.experts.1.up.weight")
    source = open_checkpoint(save_torch(tmp_path, {name: torch.zeros(2) for name in names}))
    assert [sorted(source.read(batch)) for batch in range(len(source))] == [
        ["h.0.attn.bias", "h.0.attn.weight"],
        ["h.1.attn.weight"],
        ["lm_head.weight"],
        ["m.experts.0.up.weight", "m.experts.1.up.weight"],
    ]


# ---- models


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", None])
def test_load_model_casts_what_is_not_packed(dtype: str | None) -> None:
    model = load_model(reference("qwen_vl/ckpt/tiny_chat/bin_bf16"), dtype)
    floating = {array.dtype for _, array in tree_flatten(model.parameters())}
    assert getattr(mx, dtype or "bfloat16") in floating


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match="float8"):
        load_model(reference("qwen_vl/ckpt/tiny_chat/bin_bf16"), "float8")


def without(name: str) -> Any:
    def change(weights: dict[str, torch.Tensor]) -> None:
        del weights[name]

    return change


def with_extra(weights: dict[str, torch.Tensor]) -> None:
    weights["transformer.h.0.attn.strange.weight"] = torch.ones(3, 3)


def with_shape(weights: dict[str, torch.Tensor]) -> None:
    weights["transformer.ln_f.weight"] = torch.ones(3)


def with_bias(weights: dict[str, torch.Tensor]) -> None:
    weights["transformer.h.0.mlp.w1.bias"] = torch.ones(48)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("transformer.h.1.mlp.w2.weight"), r"1 missing: .*h\.1\.mlp\.w2\.weight"),
        (with_extra, r"1 unknown: .*h\.0\.attn\.strange\.weight"),
        (with_shape, r"ln_f\.weight has shape \(3,\), but config.json asks for \(128,\)"),
        (with_bias, r"1 unknown: .*h\.0\.mlp\.w1\.bias"),
    ],
)
def test_tensors_that_do_not_fit_the_model_are_named(tmp_path: Path, change: Any, message: str) -> None:
    source = reference("qwen_vl/ckpt/tiny_chat/safetensors_fp32")
    weights = {name: torch.from_numpy(np.array(array)) for name, array in read(source).items()}
    change(weights)
    save_torch(tmp_path, weights)
    shutil.copy(source / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_biases_of_zeros_on_layers_without_biases_are_dropped(tmp_path: Path) -> None:
    """GPTQ's packer writes them for every layer."""
    source = reference("qwen_vl/ckpt/tiny_chat/safetensors_fp32")
    weights = {name: torch.from_numpy(np.array(array)) for name, array in read(source).items()}
    save_torch(tmp_path, weights | {"transformer.h.0.mlp.w1.bias": torch.zeros(48)})
    shutil.copy(source / "config.json", tmp_path)
    load_model(tmp_path)


# ---- defects


def test_half_a_checkpoint_is_named(tmp_path: Path) -> None:
    folder = copied("qwen_vl/ckpt/tiny_chat/bin_bf16", tmp_path / "m")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 files.*pytorch_model-00002-of-00002\.bin.*fetch"):
        read(folder)
    (folder / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(CheckpointError, match="1 of 2 shards"):
        read(folder)


def test_a_tensor_that_the_index_promises_and_its_file_lacks_is_named(tmp_path: Path) -> None:
    save_torch(tmp_path, {"a": torch.ones(1)}, "pytorch_model-00001-of-00001.bin")
    index = {
        "weight_map": {"a": "pytorch_model-00001-of-00001.bin", "b.c": "pytorch_model-00001-of-00001.bin"}
    }
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match=r"00001-of-00001\.bin lacks what the index says is there: b\.c"
    ):
        read(tmp_path)


def test_an_index_can_not_point_outside_the_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../x.safetensors"}})
    )
    with pytest.raises(CheckpointError, match="no file of this folder"):
        read(tmp_path)


def test_a_name_in_two_shards_is_an_error(tmp_path: Path) -> None:
    for part in (1, 2):
        save_torch(tmp_path, {"same": torch.ones(part)}, f"pytorch_model-0000{part}-of-00002.bin")
    with pytest.raises(CheckpointError, match=r"same is in pytorch_model-00001-of-00002\.bin too"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_an_lfs_pointer_is_told_from_weights(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 9876543210\n"
    )
    with pytest.raises(CheckpointError, match=r"Git LFS pointer.*git lfs pull"):
        read(tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, -1])
@pytest.mark.parametrize(
    "path",
    [
        "qwen_vl/ckpt/tiny_hd128/model.safetensors",
        "qwen_vl/ckpt/tiny_chat/bin_bf16/pytorch_model-00001-of-00002.bin",
    ],
)
def test_a_truncated_file_is_named(tmp_path: Path, path: str, keep: float) -> None:
    content = reference(path).read_bytes()
    length = int(len(content) * keep) if isinstance(keep, float) else keep
    name = "model.safetensors" if path.endswith("safetensors") else "pytorch_model.bin"
    (tmp_path / name).write_bytes(content[:length])
    with pytest.raises(CheckpointError, match=rf"{name}"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_something_else_in_the_weights_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"<!DOCTYPE html><html>404</html>" * 30)
    with pytest.raises(CheckpointError, match="fetch it again"):
        read(tmp_path)


def test_the_torch_format_before_zip_is_refused_with_the_cure(tmp_path: Path) -> None:
    save_torch(tmp_path, {"a": torch.ones(2)}, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before 1\.6.*torch\.save"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("names", "cure"),
    [
        (["m.gguf"], "take the checkpoint that they were made from"),
        (["m.gguf", "config.json"], "take the checkpoint that they were made from"),
        (["adapter_config.json", "adapter_model.safetensors"], "merge it into its base model first"),
    ],
)
def test_other_kinds_of_folders_are_told_with_the_cure(tmp_path: Path, names: list[str], cure: str) -> None:
    for name in names:
        (tmp_path / name).write_text('{"model_type": "qwen2_vl"}')
    step = find_weights if "config.json" in names else read_config
    with pytest.raises(CheckpointError, match=cure):
        step(tmp_path)


def test_an_empty_folder_and_no_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        read(tmp_path)
    with pytest.raises(CheckpointError, match="is not a folder"):
        read(tmp_path / "absent")


HEADERS = {
    "overlap": {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
    },
    "beyond the end": {"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}},
    "do not fit its shape": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 12]}},
    "type F64": {"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}},
    "damaged entry": {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
}


@pytest.mark.parametrize("defect", HEADERS)
def test_a_header_that_lies_is_refused(tmp_path: Path, defect: str) -> None:
    save_safetensors(tmp_path / "model.safetensors", HEADERS[defect], bytes(16))
    with pytest.raises(CheckpointError, match=f"a .*{defect}|a and b {defect}"):
        read(tmp_path)


# ---- pickles that want more than tensors


class Evil:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Evil(exec, ("raise SystemExit('executed')",)), r"__builtin__\.exec"),
        (Evil(shutil.rmtree, ("/nonexistent",)), r"shutil\.rmtree"),
        (Evil(torch.load, ("x",)), r"torch\.serialization\.load"),
        (torch.nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
    ],
)
def test_any_other_global_is_refused_by_name(tmp_path: Path, value: Any, name: str) -> None:
    save_torch(tmp_path, {"a": torch.ones(2), "b": value})
    with pytest.raises(CheckpointError, match=f"{name}.*refused"):
        read(tmp_path)


def test_a_pickle_without_tensors_is_refused(tmp_path: Path) -> None:
    save_torch(tmp_path, {"epoch": 3, "weights": torch.ones(2)})
    with pytest.raises(CheckpointError, match="'epoch' is no tensor"):
        read(tmp_path)


def rewrite(folder: Path, changed: bytes | None = None, compression: int = zipfile.ZIP_STORED) -> None:
    """Pack a torch file anew, with another pickle."""
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, content in entries.items():
            new.writestr(name, changed if changed is not None and name.endswith("data.pkl") else content)


def test_a_compressed_archive_is_refused_before_it_can_swell(tmp_path: Path) -> None:
    save_torch(tmp_path, {"a": torch.zeros(1000)})
    rewrite(tmp_path, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        read(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        (b"(K\x03t", b"(K\x7ft"),  # a larger shape than the storage
        (b"K\x00(K\x03", b"K\x02(K\x03"),  # an offset that pushes it over the end
    ],
)
def test_a_tensor_beyond_its_storage_is_named(tmp_path: Path, change: tuple[bytes, bytes]) -> None:
    save_torch(tmp_path, {"a.b": torch.ones(3)})
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin") as archive:
        content = archive.read("pytorch_model/data.pkl")
    text = content.replace(*change)
    shape = content.replace(b"K\x03\x85", b"K\x7f\x85") if text == content else text
    assert shape != content
    rewrite(tmp_path, shape)
    with pytest.raises(CheckpointError, match=r"a\.b reaches beyond its storage"):
        read(tmp_path)


def test_plain_pickles_are_no_torch_files(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="no torch file"):
        read(tmp_path)
