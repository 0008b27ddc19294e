"""A folder on disk -> a loaded model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from qwenvl_mlx.checkpoint.files import brief, read_config, some
from qwenvl_mlx.checkpoint.quantized import unpack
from qwenvl_mlx.checkpoint.reading import Weights, open_checkpoint
from qwenvl_mlx.config import one_of
from qwenvl_mlx.errors import CheckpointError, ConfigError
from qwenvl_mlx.layers.shard import Group
from qwenvl_mlx.models import model_class
from qwenvl_mlx.models.base import VisionLanguageModel

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
# What Python and MLX raise when numbers, types or shapes from a damaged file meet.
WRONG_VALUES = (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError, RuntimeError)
LARGEST = {
    "num_hidden_layers": 1000,
    "layers": 1000,
    "depth": 1000,
    "num_experts": 10_000,
    "image_size": 8192,
    "n_queries": 65_536,
    "num_position_embeddings": 1 << 20,
}
# MLX's formats without biases, by (bits, group size).
BIASLESS_MODES = {(4, 32): "mxfp4", (4, 16): "nvfp4", (8, 32): "mxfp8"}


def load_model(
    path: str | os.PathLike[str], dtype: str | None = None, *, group: Group | None = None
) -> VisionLanguageModel:
    """Load the checkpoint in the folder ``path``, PyTorch or MLX, plain or quantised.

    ``dtype`` ("float32", "bfloat16", "float16"): type of what is not packed integers; None: as stored.
    ``group``: machines that share the model; this one keeps its part.
    Raises ``CheckpointError`` or ``ConfigError``.
    """
    folder = Path(path)
    config = read_config(folder)
    model = build(config)
    # Held by nobody but the model: what prepare() joins is freed layer by layer.
    fill(model, read_all(folder, type(model), config, mlx_dtype(dtype)), folder)
    if group is not None and group.size() > 1:
        model.shard(group)
    model.prepare()
    mx.eval(model.parameters())
    return model


def build(config: Mapping[str, Any]) -> VisionLanguageModel:
    """The model that ``config.json`` describes, its weights not computed; ``ConfigError`` when it describes none."""
    _check_counts(config)
    try:
        return model_class(config)(config)
    except WRONG_VALUES as error:
        raise ConfigError(
            f"config.json holds a value that no model can have ({brief(error)}): fetch it again"
        ) from error


def arrange(
    weights: Weights, cls: type[VisionLanguageModel], config: Mapping[str, Any], dtype: mx.Dtype | None
) -> Weights:
    """Tensors as a checkpoint has them -> under the model's names, in its shapes, quantised modules in MLX's form."""
    try:
        return cls.sanitize(unpack(weights, config, dtype), config)
    except WRONG_VALUES as error:
        raise CheckpointError(
            f"the tensors do not fit the model of config.json ({brief(error)}): fetch them again"
        ) from error


def mlx_dtype(name: str | None) -> mx.Dtype | None:
    """ "float32" -> ``mx.float32``; None stays None."""
    if name is None:
        return None
    one_of(name, DTYPES, key="dtype", where="load")
    return DTYPES[name]


def cast_floating(
    name: str, array: mx.array, cls: type[VisionLanguageModel], dtype: mx.Dtype | None
) -> mx.array:
    """``array`` in ``dtype``, unless it holds integers, or the generation wants it in float32.

    Scales of packed integers are never narrowed: that would round the weights anew.
    """
    if dtype is None or not mx.issubdtype(array.dtype, mx.floating):
        return array
    if name.endswith((".scales", ".biases")) and array.dtype.size > dtype.size:
        return array
    return array.astype(mx.float32 if cls.keep_float32(name) else dtype)


def fill(model: VisionLanguageModel, weights: Weights, source: Path) -> None:
    """Quantise the modules that have scales, check every name and shape, and load."""
    quantise_modules(model, weights)
    expected = dict(tree_flatten(model.parameters()))
    weights = without_zero_biases(weights, expected)
    check_names(weights, expected, source)
    model.load_weights(list(weights.items()), strict=True)


def check_names(weights: Weights, expected: Mapping[str, mx.array], source: Path) -> None:
    """``CheckpointError`` lists tensors that are missing, unknown or of another shape."""
    missing = sorted(expected.keys() - weights.keys())
    unknown = sorted(weights.keys() - expected.keys())
    if missing or unknown:
        parts = (("missing", missing), ("unknown", unknown))
        lists = "; ".join(f"{len(names)} {what}: {some(names)}" for what, names in parts if names)
        raise CheckpointError(
            f"{source} does not hold this model's tensors ({lists}): is the checkpoint complete?"
        )
    for name, array in weights.items():
        if array.shape != expected[name].shape:
            raise CheckpointError(
                f"{source}: {name} has shape {array.shape}, but config.json asks for {expected[name].shape}"
            )


def without_zero_biases(weights: Weights, expected: Mapping[str, Any]) -> Weights:
    """Drop the biases that GPTQ's packer adds, all zeros, to layers that have none."""
    added = [name for name in weights if name.endswith(".bias") and name not in expected]
    zeros = {
        name
        for name in added
        if f"{name.removesuffix('bias')}weight" in expected and not mx.any(weights[name])
    }
    return {name: array for name, array in weights.items() if name not in zeros}


def quantise_modules(model: nn.Module, weights: Weights) -> None:
    """Replace each module that has ``.scales`` by its quantised form; sizes and mode follow from the tensors."""
    quantised = {name.removesuffix(".scales") for name in weights if name.endswith(".scales")}

    def settings(path: str, module: nn.Module) -> dict[str, Any] | bool:
        if path not in quantised or not hasattr(module, "to_quantized"):
            return False
        return module_settings(path, weights, module.weight.shape[-1])

    nn.quantize(model, class_predicate=settings)


def module_settings(path: str, weights: Weights, inputs: int) -> dict[str, Any]:
    """``bits``, ``group_size`` and ``mode`` of a quantised module with ``inputs`` input features."""
    packed, scales = weights.get(f"{path}.weight"), weights[f"{path}.scales"]
    if packed is None or packed.dtype != mx.uint32 or not packed.shape[-1] or not scales.shape[-1]:
        raise CheckpointError(f"{path} has scales but no packed weights: is the checkpoint complete?")
    bits, group = packed.shape[-1] * 32 // inputs, inputs // scales.shape[-1]
    mode = "affine" if f"{path}.biases" in weights else BIASLESS_MODES.get((bits, group))
    if mode is None or bits * inputs != packed.shape[-1] * 32 or group * scales.shape[-1] != inputs:
        raise CheckpointError(
            f"{path}: {packed.shape} packed weights and {scales.shape} scales do not fit {inputs} inputs"
        )
    if mode == "affine" and (bits not in (2, 3, 4, 5, 6, 8) or group not in (16, 32, 64, 128)):
        raise ConfigError(f"{path} is quantised to {bits} bits in groups of {group}, which MLX does not have")
    return {"bits": bits, "group_size": group, "mode": mode}


def read_all(
    folder: Path, cls: type[VisionLanguageModel], config: Mapping[str, Any], dtype: mx.Dtype | None
) -> Weights:
    """All tensors of a folder as ``arrange`` gives them, in ``dtype``."""
    source = open_checkpoint(folder)
    weights: Weights = {}
    for batch in range(len(source)):
        part = arrange(source.read(batch), cls, config, dtype)
        weights |= {name: cast_floating(name, array, cls, dtype) for name, array in part.items()}
    return weights


def _check_counts(config: Mapping[str, Any]) -> None:
    """A damaged number of layers or pixels must not keep the machine busy before it is found out."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_counts(value)
        elif key in LARGEST and isinstance(value, int) and value > LARGEST[key]:
            raise ConfigError(f"config.json: {key} = {value} is no number that a model has: fetch it again")
