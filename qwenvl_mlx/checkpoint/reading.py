"""Read the weights of a checkpoint's folder under the names that its files use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import mlx.core as mx

from qwenvl_mlx.checkpoint.files import WeightFiles, find_weights, some
from qwenvl_mlx.checkpoint.safetensors import check_header, load_arrays
from qwenvl_mlx.checkpoint.torch_file import TorchTensor, scan_torch
from qwenvl_mlx.errors import CheckpointError

Weights = dict[str, mx.array]
DECISIVE = (".qzeros", ".g_idx")
T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """An opened checkpoint: every name, shape and range checked, no tensor read.

    MLX arrays of safetensors files are lazy: such a checkpoint is one batch. Those of torch files can't be (MLX reads
    ahead from anything but a file of its own formats), so it is read in batches of one module each: what turns names
    and shapes into another layout gets a module's tensors together, and no more than those are in memory.
    """

    files: WeightFiles
    batches: tuple[tuple[TorchTensor, ...], ...]

    def __len__(self) -> int:
        return len(self.batches) if self.files.torch else 1

    def read(self, batch: int) -> Weights:
        """The tensors of one batch. Nothing here holds on to them."""
        if self.files.torch:
            return {tensor.name: tensor.read() for tensor in self.batches[batch]}
        return {name: array for path in self.files.paths for name, array in load_arrays(path).items()}

    def outline(self, batch: int) -> Weights:
        """As ``read``, with the right shapes and types but without values: to see what a layout makes of them.

        Zeros and group indices of quantised modules are real: forms and types depend on them.
        """
        if not self.files.torch:
            return self.read(batch)
        return {
            tensor.name: tensor.read()
            if tensor.name.endswith(DECISIVE)
            else mx.zeros(tensor.shape, tensor.mlx_dtype)
            for tensor in self.batches[batch]
        }


def open_checkpoint(folder: Path) -> Source:
    """Find, open and check all files of weights. ``CheckpointError`` names the file and tensor that is wrong."""
    files = find_weights(folder)
    if files.torch:
        return Source(files, _modules(_merged(files, scan_torch)))
    _merged(files, check_header)
    return Source(files, ())


def read(folder: Path) -> Weights:
    """All tensors under the names in the files; lazy where the files are safetensors."""
    source = open_checkpoint(folder)
    return {name: array for batch in range(len(source)) for name, array in source.read(batch).items()}


def _merged(files: WeightFiles, scan: Callable[[Path], Mapping[str, T]]) -> dict[str, T]:
    found: dict[str, T] = {}
    origin: dict[str, Path] = {}
    for path in files.paths:
        for name, tensor in scan(path).items():
            if name in found:
                raise CheckpointError(
                    f"{path}: {name} is in {origin[name].name} too: the folder mixes checkpoints"
                )
            found[name], origin[name] = tensor, path
    absent = sorted(
        name for name, file in (files.index or {}).items() if name not in found or origin[name].name != file
    )
    if absent:
        where = (files.index or {})[absent[0]]
        raise CheckpointError(
            f"{files.paths[0].parent / where} lacks what the index says is there: {some(absent)}"
        )
    return found


def _modules(tensors: dict[str, TorchTensor]) -> tuple[tuple[TorchTensor, ...], ...]:
    """Tensors grouped by the module that owns them, a layer's experts together, in the order of their names."""
    groups: dict[str, list[TorchTensor]] = {}
    for name in sorted(tensors):
        layer, experts, _ = name.partition(".experts.")
        groups.setdefault(layer if experts else name.rpartition(".")[0], []).append(tensors[name])
    return tuple(tuple(group) for group in groups.values())
