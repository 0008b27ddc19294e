"""Read torch's zip files without torch: where each tensor's bytes are, and then one tensor at a time."""

from __future__ import annotations

import math
import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np

from qwenvl_mlx.checkpoint.files import brief, refuse_pointer
from qwenvl_mlx.checkpoint.pickles import PickleError, Storage, StoredTensor, tensors_of
from qwenvl_mlx.errors import CheckpointError

LOCAL_HEADER = struct.Struct("<4s22xHH")  # magic, …, length of the name, length of the extra field
LARGEST_PICKLE = 256 << 20
RESAVE = "open it once with torch and save it again: torch.save(torch.load(f, weights_only=True), f)"
ITEM_SIZES = {"bfloat16": 2}
# What zipfile raises, besides its own error, when numbers in an archive are wrong.
DAMAGED = (zipfile.BadZipFile, RuntimeError, ValueError, ArithmeticError, struct.error, EOFError, OSError)


@dataclass(frozen=True)
class TorchTensor:
    """One tensor of a torch file, not yet read. ``begin``: where its first value is in the file, in bytes."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    begin: int

    @property
    def mlx_dtype(self) -> mx.Dtype:
        """float64 becomes float32: MLX has no float64 on GPUs."""
        kind = {"float64": "float32", "bool": "bool_"}.get(self.dtype, self.dtype)
        dtype: mx.Dtype = getattr(mx, kind)
        return dtype

    def read(self) -> mx.array:
        """The tensor's values. Holds the tensor once; one with odd strides twice."""
        size = _span(self.shape, self.strides)
        flat = _read_values(self.path, self.name, self.begin, size, self.dtype)
        if self.dtype == "float64":
            flat = mx.array(np.array(flat, copy=False).view(np.float64).astype(np.float32))
        else:
            flat = flat.view(self.mlx_dtype)
        if size == math.prod(self.shape) and self.strides == _row_strides(self.shape):
            return flat.reshape(self.shape)
        return mx.contiguous(mx.as_strided(flat, self.shape, self.strides, 0))


def scan_torch(path: Path) -> dict[str, TorchTensor]:
    """All tensors of a torch file; ``CheckpointError`` names the file and the tensor that is damaged."""
    with path.open("rb") as file:
        _check_magic(path, file)
        try:
            with zipfile.ZipFile(file) as archive:
                return _scan(path, file, archive)
        except PickleError as error:
            raise CheckpointError(f"{path} can't be read: {error}") from error
        except DAMAGED as error:
            raise CheckpointError(
                f"{path} is truncated or damaged ({brief(error)}): fetch it again"
            ) from error


def _check_magic(path: Path, file: BinaryIO) -> None:
    head = file.read(512)
    refuse_pointer(path, head)
    if head.startswith(b"PK\x03\x04"):
        return
    if head.startswith(b"\x80\x02\x8a\x0a") or head[257:262] == b"ustar":
        raise CheckpointError(f"{path} has the format of torch before 1.6: {RESAVE}")
    raise CheckpointError(f"{path} is no torch file: fetch it again")


def _scan(path: Path, file: BinaryIO, archive: zipfile.ZipFile) -> dict[str, TorchTensor]:
    entries = {entry.filename: entry for entry in archive.infolist()}
    pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(
            f"{path} is no torch checkpoint (it has {len(pickles)} data.pkl): fetch it again"
        )
    root = pickles[0].removesuffix("data.pkl")
    order = entries.get(f"{root}byteorder")
    if order is not None and _content(path, file, order, 16) != b"little":
        raise CheckpointError(f"{path} was written on a big-endian machine: {RESAVE}")
    stored = tensors_of(_content(path, file, entries[pickles[0]], LARGEST_PICKLE))
    begins: dict[Storage, int] = {}
    for tensor in stored.values():
        if tensor.storage not in begins:
            begins[tensor.storage] = _storage_begin(
                path, file, entries.get(f"{root}data/{tensor.storage.key}"), tensor
            )
    return {name: _located(path, name, tensor, begins[tensor.storage]) for name, tensor in stored.items()}


def _storage_begin(path: Path, file: BinaryIO, entry: zipfile.ZipInfo | None, tensor: StoredTensor) -> int:
    storage = tensor.storage
    if entry is None or entry.file_size < storage.length * item_size(storage.dtype):
        raise CheckpointError(
            f"{path}: storage {storage.key[:40]!r} is missing or too short: fetch the file again"
        )
    return _data_begin(path, file, entry)


def _located(path: Path, name: str, tensor: StoredTensor, begin: int) -> TorchTensor:
    """A tensor must lie within its storage, and hold no more values than it: no expanded ones."""
    count, storage = math.prod(tensor.shape), tensor.storage
    if count > storage.length or tensor.offset + _span(tensor.shape, tensor.strides) > storage.length:
        raise CheckpointError(
            f"{path}: {name} reaches beyond its storage: the file is damaged, fetch it again"
        )
    begin += tensor.offset * item_size(storage.dtype)
    rows = _row_strides(tensor.shape)
    # The stride of an axis with one entry may be anything.
    strides = tuple(
        row if size == 1 or not count else stride
        for size, stride, row in zip(tensor.shape, tensor.strides, rows, strict=True)
    )
    return TorchTensor(path, name, storage.dtype, tensor.shape, strides, begin)


def _content(path: Path, file: BinaryIO, entry: zipfile.ZipInfo, limit: int) -> bytes:
    if entry.file_size > limit:
        raise CheckpointError(
            f"{path}: {entry.filename[:80]!r} is too large: the file is damaged, fetch it again"
        )
    file.seek(_data_begin(path, file, entry))
    return file.read(entry.file_size)


def _data_begin(path: Path, file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of a stored entry begin; all of them must lie within the file."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise CheckpointError(f"{path} is compressed or encrypted, which torch never does: {RESAVE}")
    file.seek(max(entry.header_offset, 0))
    header = file.read(LOCAL_HEADER.size)
    if len(header) == LOCAL_HEADER.size and header.startswith(b"PK\x03\x04"):
        _, name, extra = LOCAL_HEADER.unpack(header)
        begin: int = entry.header_offset + LOCAL_HEADER.size + name + extra
        if entry.header_offset >= 0 and begin + entry.file_size <= os.fstat(file.fileno()).st_size:
            return begin
    raise CheckpointError(f"{path} is truncated or damaged at {entry.filename[:80]!r}: fetch it again")


def _read_values(path: Path, name: str, begin: int, count: int, dtype: str) -> mx.array:
    """The bytes of ``count`` values, read straight into an array's memory, as unsigned integers."""
    width = item_size(dtype)
    unsigned = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}[width]
    values = mx.zeros((count,), unsigned)
    if not count:
        return values
    mx.eval(values)
    memory = np.array(values, copy=False).view(np.uint8).data
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        done = 0
        while done < len(memory):
            got = file.readinto(memory[done:])
            if not got:
                raise CheckpointError(
                    f"{path}: {name} can't be read to its end: the file is truncated, fetch it again"
                )
            done += got
    return values


def item_size(dtype: str) -> int:
    """Bytes of one value."""
    return ITEM_SIZES.get(dtype) or np.dtype(dtype).itemsize


def _row_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How many values of the storage lie between the tensor's first and last one, inclusive."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
