"""Read safetensors files lazily, after checking every entry of their header.

MLX reads the header again and trusts it: a wrong offset would give another tensor's bytes. So it gets only files
whose header is sound.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from qwenvl_mlx.checkpoint.files import brief, refuse_pointer
from qwenvl_mlx.errors import CheckpointError

# Bytes of one value, for the types that MLX reads (F8 ones as uint8).
ITEM_SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
}
LONGEST_HEADER = 100_000_000  # the format's own limit
LARGEST_DIMENSION = 2**31 - 1  # MLX counts in int32


def load_arrays(path: Path) -> dict[str, mx.array]:
    """Lazy arrays under the file's names; the header must have been checked."""
    try:
        return cast(dict[str, mx.array], mx.load(str(path), format="safetensors"))
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read ({brief(error)}): fetch it again") from error


def check_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, every entry checked against the file's size."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(64)
        refuse_pointer(path, head)
        if head.startswith(b"PK\x03\x04"):
            raise CheckpointError(f"{path} is a torch file in spite of its name: rename it to *.bin")
        length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else 0
        if not 2 <= length <= min(size - 8, LONGEST_HEADER):
            raise CheckpointError(f"{path} is truncated or no safetensors file: fetch it again")
        file.seek(8)
        header = _parse(path, file.read(length))
    _check_ranges(path, header, size - 8 - length)
    return header


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged header ({brief(error)}): fetch it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a header that is no JSON object: fetch it again")
    header.pop("__metadata__", None)
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _check_ranges(path: Path, header: dict[str, Any], size: int) -> None:
    """Every tensor's bytes fit its shape, lie within the file, and overlap no other's."""
    ranges = []
    for name, entry in header.items():
        begin, end = _entry_range(path, name, entry)
        if end > size:
            raise CheckpointError(
                f"{path}: {name} reaches beyond the end of the file: it is truncated, fetch it again"
            )
        ranges.append((begin, end, name))
    ranges.sort()
    for (_, end, first), (begin, _, second) in itertools.pairwise(ranges):
        if begin < end:
            raise CheckpointError(
                f"{path}: {first} and {second} overlap: the file is damaged, fetch it again"
            )


def _entry_range(path: Path, name: str, entry: Any) -> tuple[int, int]:
    entry = entry if isinstance(entry, dict) else {}
    kind, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(kind, str) or kind not in ITEM_SIZES:
        raise CheckpointError(f"{path}: {name} has values of type {str(kind)[:40]}, which MLX can't hold")
    if not _sizes(shape, LARGEST_DIMENSION) or not _sizes(offsets, 2**62) or len(offsets) != 2:
        raise CheckpointError(f"{path}: {name} has a damaged entry in the header: fetch the file again")
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_SIZES[kind]:
        raise CheckpointError(f"{path}: {name} has {end - begin} bytes, which do not fit its shape {shape}")
    return begin, end


def _sizes(value: Any, limit: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 16
        and all(type(n) is int and 0 <= n <= limit for n in value)
    )
