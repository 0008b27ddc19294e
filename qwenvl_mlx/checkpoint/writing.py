"""Write safetensors shards one tensor at a time: headers come from shapes, values when their turn has come."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np

SHARD_BYTES = 5_000_000_000
METADATA = {"format": "mlx"}
NAMES = {
    mx.bool_: "BOOL",
    mx.uint8: "U8",
    mx.int8: "I8",
    mx.uint16: "U16",
    mx.int16: "I16",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.int32: "I32",
    mx.float32: "F32",
    mx.uint64: "U64",
    mx.int64: "I64",
}


@dataclass(frozen=True)
class Outline:
    """Shape and type of a tensor that is not there yet."""

    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * int(self.dtype.size)


def write_shards(
    folder: Path,
    outlines: Mapping[str, Outline],
    fetch: Callable[[str], mx.array],
    *,
    done: Callable[[int], object] = lambda _: None,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write ``model-0000x-of-0000y.safetensors`` and the index; the order of tensors is that of their names.

    ``fetch(name)`` gives each tensor once, in that order; ``done(bytes)`` is called after each. All files are synced.
    """
    shards = plan_shards(outlines, shard_bytes)
    paths = [folder / f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for path, names in zip(paths, shards, strict=True):
        with path.open("wb") as file:
            file.write(_header({name: outlines[name] for name in names}))
            for name in names:
                array = fetch(name)
                file.write(_bytes(name, array, outlines[name]))
                done(array.nbytes)
                del array
                mx.clear_cache()
            _sync(file)
    write_json(folder / "model.safetensors.index.json", _index(outlines, paths, shards))
    return paths


def plan_shards(outlines: Mapping[str, Outline], shard_bytes: int = SHARD_BYTES) -> list[list[str]]:
    """Names in order, cut where a shard would exceed ``shard_bytes``."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name in sorted(outlines):
        size = outlines[name].nbytes
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def write_json(path: Path, value: object) -> None:
    """A JSON file, readable and synced."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """A text file, synced."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """A small file, synced."""
    with path.open("wb") as file:
        file.write(content)
        _sync(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _header(outlines: Mapping[str, Outline]) -> bytes:
    header: dict[str, object] = {"__metadata__": METADATA}
    begin = 0
    for name, outline in outlines.items():
        end = begin + outline.nbytes
        header[name] = {
            "dtype": NAMES[outline.dtype],
            "shape": list(outline.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes(name: str, array: mx.array, outline: Outline) -> memoryview:
    """The memory of an array, row by row, without a copy where it lies so already."""
    if (array.shape, array.dtype) != (outline.shape, outline.dtype):
        raise ValueError(f"{name} became {array.shape} {array.dtype}, planned was {outline}")
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
    flat = mx.contiguous(array).reshape(-1)
    mx.eval(flat)
    return np.array(flat, copy=False).view(np.uint8).data


def _index(outlines: Mapping[str, Outline], paths: list[Path], shards: list[list[str]]) -> dict[str, object]:
    places = {name: path.name for path, names in zip(paths, shards, strict=True) for name in names}
    total = sum(outline.nbytes for outline in outlines.values())
    return {"metadata": {"total_size": total}, "weight_map": places}
