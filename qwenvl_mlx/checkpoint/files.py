"""Find the files of weights in a checkpoint's folder, and notice when some are missing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenvl_mlx.config import read_json
from qwenvl_mlx.errors import CheckpointError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
SHARD = re.compile(r"(?P<stem>.+)-(?P<part>\d+)-of-(?P<parts>\d+)(?P<suffix>\.(safetensors|bin))")
GPTQ_FILE, AWQ_FILE = "quantize_config.json", "quant_config.json"
AWQ_KEYS = {"w_bit": "bits", "q_group_size": "group_size"}
OTHER_KINDS = {
    "*.gguf": "GGUF files, which are not read here: take the checkpoint that they were made from",
    "adapter_config.json": "an adapter, not a model: merge it into its base model first (peft: merge_and_unload)",
}
NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")


@dataclass(frozen=True)
class WeightFiles:
    """Files of one kind (all safetensors, or all torch), and where the index says that each tensor is."""

    paths: tuple[Path, ...]
    index: Mapping[str, str] | None = None

    @property
    def torch(self) -> bool:
        return self.paths[0].suffix == ".bin"


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json``, with the quantiser's own file under ``quantization_config`` where only that one has settings.

    AutoGPTQ writes ``quantize_config.json``, AutoAWQ once wrote ``quant_config.json``. Raises ``CheckpointError``.
    """
    if not (folder / "config.json").exists():
        _refuse_other_kinds(folder)
    config = read_json(folder / "config.json")
    if config.get("quantization") or config.get("quantization_config"):
        return config
    if (folder / GPTQ_FILE).is_file():
        config["quantization_config"] = {"quant_method": "gptq", **read_json(folder / GPTQ_FILE)}
    elif (folder / AWQ_FILE).is_file():
        given = read_json(folder / AWQ_FILE)
        renamed = {new: given[old] for old, new in AWQ_KEYS.items() if old in given}
        config["quantization_config"] = {"quant_method": "awq", **given, **renamed}
    return config


def find_weights(folder: Path) -> WeightFiles:
    """The files to read: safetensors before torch, an index before single files.

    Raises ``CheckpointError`` when there are none, or when only a part of the checkpoint is there.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: pass the folder of a checkpoint")
    for suffix, stem in ((".safetensors", "model"), (".bin", "pytorch_model")):
        index = folder / f"{stem}{suffix}.index.json"
        if index.exists():
            return _indexed(folder, index)
        if (folder / f"{stem}{suffix}").exists():
            return WeightFiles((folder / f"{stem}{suffix}",))
        paths = sorted(path for path in folder.glob(f"*{suffix}") if path.name not in NOT_WEIGHTS)
        if paths:
            _no_shard_missing(folder, paths)
            return WeightFiles(tuple(paths))
    _refuse_other_kinds(folder)
    raise CheckpointError(f"{folder} holds no weights (*.safetensors or *.bin): is the download complete?")


def _refuse_other_kinds(folder: Path) -> None:
    for pattern, what in OTHER_KINDS.items():
        if any(folder.glob(pattern)):
            raise CheckpointError(f"{folder} holds {what}")


def _indexed(folder: Path, path: Path) -> WeightFiles:
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{path} has no weight_map: fetch it again")
    for tensor, file in index.items():
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or not file.endswith((".safetensors", ".bin"))
        ):
            raise CheckpointError(f"{path}: {tensor} is in {file!r}, which is no file of this folder")
    files = sorted(set(index.values()))
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        raise CheckpointError(
            f"{folder}: {len(absent)} of {len(files)} files named in {path.name} are missing "
            f"({some(absent)}): fetch them"
        )
    if len({Path(file).suffix for file in files}) > 1:
        raise CheckpointError(f"{path} mixes safetensors and torch files: fetch the checkpoint again")
    return WeightFiles(tuple(folder / file for file in files), index)


def _no_shard_missing(folder: Path, paths: list[Path]) -> None:
    """Without an index, the names still tell how many shards there should be."""
    for path in paths:
        shard = SHARD.fullmatch(path.name)
        if shard is None:
            continue
        found = [other for other in paths if other.name.startswith(f"{shard['stem']}-")]
        if len(found) != int(shard["parts"]):
            raise CheckpointError(
                f"{folder} holds {len(found)} of {int(shard['parts'])} shards: fetch the others"
            )


def refuse_pointer(path: Path, head: bytes) -> None:
    """A clone without LFS leaves a few lines of text where the weights should be."""
    if head.startswith(LFS_POINTER[: max(len(head), 1)]) and len(head) >= 8:
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not weights: run 'git lfs pull' in {path.parent}"
        )


def some(names: list[str], limit: int = 8) -> str:
    """Up to ``limit`` names for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def brief(error: Exception) -> str:
    """An error of a library in a few words of one line."""
    text = " ".join(str(error).split())
    return (text[:157] + "..." if len(text) > 160 else text) or type(error).__name__
