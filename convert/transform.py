"""Tensors of the source -> tensors of the MLX folder, planned from shapes first and computed one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from qwenvl_mlx.checkpoint import Source, Weights, open_checkpoint
from qwenvl_mlx.checkpoint.files import some
from qwenvl_mlx.checkpoint.loading import (
    DTYPES,
    arrange,
    build,
    cast_floating,
    check_names,
    mlx_dtype,
    module_settings,
    without_zero_biases,
)
from qwenvl_mlx.checkpoint.writing import Outline
from qwenvl_mlx.convert.options import ConvertOptions, Settings
from qwenvl_mlx.convert.recipe import Recipe, make_recipe, quantisable
from qwenvl_mlx.errors import CheckpointError
from qwenvl_mlx.models.base import VisionLanguageModel

SAMPLED_ROWS = 256  # of a matrix, for its error: their norm tells that of the whole within a few per cent


@dataclass(frozen=True)
class Plan:
    """A conversion with every shape known and nothing computed.

    ``wanted``: settings of modules to quantise anew; ``calibrated``: those that are quantised already, by their path.
    ``outlines``: the tensors of the result; ``owners``: the source's batch that each comes from; ``recipe``: settings
    of the modules that are quantised in the result.
    """

    source: Source
    cls: type[VisionLanguageModel]
    config: Mapping[str, Any]
    options: ConvertOptions
    modules: Mapping[str, int]
    wanted: Recipe
    recipe: Recipe
    parameters: frozenset[str]
    outlines: Mapping[str, Outline]
    owners: Mapping[str, int]
    calibrated: Mapping[str, Weights] = field(default_factory=dict)


def make_plan(folder: Path, config: Mapping[str, Any], options: ConvertOptions) -> Plan:
    """Check the whole source against its ``config.json`` and lay the result out.

    Raises ``ConfigError`` or ``CheckpointError``: whatever is wrong with names and shapes shows here, before anything
    is written.
    """
    model = build(config)
    cls = type(model)
    modules = quantisable(model)
    wanted = make_recipe(modules, options)
    parameters = frozenset(dict(tree_flatten(model.parameters())))
    plan = Plan(open_checkpoint(folder), cls, config, options, modules, wanted, {}, parameters, {}, {})
    outlines: dict[str, mx.array] = {}
    owners: dict[str, int] = {}
    for batch in range(len(plan.source)):
        for name, array in compute(plan, plan.source.outline(batch)).weights.items():
            if name in outlines:
                raise CheckpointError(f"{folder}: two tensors become {name}: the folder mixes checkpoints")
            outlines[name], owners[name] = array, batch
    recipe = _recipe_of(outlines, modules)
    quantise_modules(model, recipe)
    check_names(outlines, dict(tree_flatten(model.parameters())), folder)
    sizes = {name: Outline(array.shape, array.dtype) for name, array in outlines.items()}
    return Plan(plan.source, cls, config, options, modules, wanted, recipe, parameters, sizes, owners)


def quantise_modules(model: VisionLanguageModel, recipe: Recipe) -> None:
    """Give the modules of a recipe their quantised form."""
    nn.quantize(model, class_predicate=lambda path, _: recipe[path].as_dict() if path in recipe else False)


def empty_result(plan: Plan) -> VisionLanguageModel:
    """The model that the result will be, with the types of all its arrays and no values."""
    model = build(plan.config)
    quantise_modules(model, plan.recipe)
    model.load_weights([(name, mx.zeros(part.shape, part.dtype)) for name, part in plan.outlines.items()])
    return model


class Computed(NamedTuple):
    """Lazy tensors of the result, and the floating point weights of the modules that are quantised anew."""

    weights: Weights
    originals: Weights


def compute(plan: Plan, weights: Weights) -> Computed:
    """Tensors of one batch of the source -> those of the result."""
    dtype = mlx_dtype(plan.options.dtype)
    # What is quantised anew is not rounded before, unless to a type that was asked for: FP8 goes through float32.
    exact = arrange(weights, plan.cls, plan.config, dtype or mx.float32) if plan.wanted else {}
    weights = arrange(weights, plan.cls, plan.config, dtype)
    weights = without_zero_biases(weights, dict.fromkeys(plan.parameters))
    result = Computed({}, {})
    for name, array in weights.items():
        path, _, kind = name.rpartition(".")
        quantised = f"{path}.scales" in weights
        if quantised and kind in ("scales", "biases"):
            continue
        if quantised and kind == "weight":
            _add_requantised(result, plan, path, weights)
        elif kind == "weight" and path in plan.wanted:
            original = cast_floating(name, exact[name], plan.cls, dtype)
            _add_quantised(result, plan, path, original, dtype or array.dtype)
        else:
            result.weights[name] = cast_floating(name, array, plan.cls, dtype)
    return result


def quantise(path: str, weight: mx.array, settings: Settings, dtype: mx.Dtype) -> Weights:
    """The tensors of one quantised module; ``dtype``: of scales and biases in affine mode."""
    packed, *rest = mx.quantize(weight, settings.group_size, settings.bits, mode=settings.mode)
    if settings.mode == "affine":
        rest = [part.astype(dtype) for part in rest]
    kinds = ("weight", "scales", "biases")
    return {f"{path}.{kind}": part for kind, part in zip(kinds, (packed, *rest), strict=False)}


def dequantise(path: str, weights: Weights, settings: Settings, dtype: mx.Dtype) -> mx.array:
    """The floating point weights of one quantised module."""
    scales, biases = weights[f"{path}.scales"], weights.get(f"{path}.biases")
    if biases is not None:  # affine: computed in float32, rounded once
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    weight = mx.dequantize(
        weights[f"{path}.weight"],
        scales,
        biases,
        settings.group_size,
        settings.bits,
        mode=settings.mode,
        dtype=mx.float32,
    )
    return weight.astype(dtype)


class Stream:
    """Gives the tensors of a plan in order, computing each batch of the source when its first one is asked for.

    ``errors``: relative error of each module that has been quantised on the way, by its path.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.batch = -1
        self.ready = Computed({}, {})
        self.errors: dict[str, float] = {}

    def fetch(self, name: str) -> mx.array:
        """One tensor; it is given away, not kept."""
        owner = self.plan.owners[name]
        if owner != self.batch or name not in self.ready.weights:
            self.ready = compute(self.plan, self.plan.source.read(owner))
            self.batch = owner
            strange = [new for new in self.ready.weights if self.plan.owners.get(new) != owner]
            if strange:
                raise CheckpointError(f"{some(strange)}: values for which the model has no place")
        self._measure(name.rpartition(".")[0])
        return self.ready.weights.pop(name)

    def _measure(self, path: str) -> None:
        """Compare a module with its original as soon as one of its tensors is asked for, then let the original go."""
        original = self.ready.originals.pop(path, None)
        if original is not None:
            self.errors[path] = relative_error(original, self.ready.weights, path, self.plan.wanted[path])


def relative_error(original: mx.array, weights: Weights, path: str, settings: Settings) -> float:
    """Norm of the difference over the norm of the original, on rows spread evenly over the matrix."""
    original = original.reshape(-1, original.shape[-1])
    step = -(-len(original) // SAMPLED_ROWS)
    kinds = (f"{path}.{kind}" for kind in ("weight", "scales", "biases"))
    rows = {
        name: weights[name].reshape(-1, weights[name].shape[-1])[::step] for name in kinds if name in weights
    }
    exact = original[::step].astype(mx.float32)
    difference = exact - dequantise(path, rows, settings, mx.float32)
    norm = float(np.linalg.norm(np.array(exact)))
    return float(np.linalg.norm(np.array(difference))) / norm if norm else 0.0


def _add_quantised(result: Computed, plan: Plan, path: str, weight: mx.array, dtype: mx.Dtype) -> None:
    result.weights.update(plan.calibrated.get(path) or quantise(path, weight, plan.wanted[path], dtype))
    result.originals[path] = weight


def _add_requantised(result: Computed, plan: Plan, path: str, weights: Weights) -> None:
    """A module that the source has quantised: kept as it is, unless other settings or none are wanted."""
    if path not in plan.modules:
        raise CheckpointError(f"{path} is quantised, which this model's module can't be")
    dtype = mlx_dtype(plan.options.dtype)
    present = Settings(**module_settings(path, weights, plan.modules[path]))
    wanted = plan.wanted.get(path)
    if not plan.options.dequantise and wanted in (None, present):
        names = [f"{path}.{kind}" for kind in ("weight", "scales", "biases") if f"{path}.{kind}" in weights]
        result.weights.update((name, cast_floating(name, weights[name], plan.cls, dtype)) for name in names)
        return
    stored = dtype or _stored_dtype(plan.config)
    if wanted is None:
        result.weights[f"{path}.weight"] = dequantise(path, weights, present, stored)
    else:
        _add_quantised(result, plan, path, dequantise(path, weights, present, dtype or mx.float32), stored)


def _recipe_of(outlines: Weights, modules: Mapping[str, int]) -> Recipe:
    return {
        path: Settings(**module_settings(path, outlines, inputs))
        for path, inputs in modules.items()
        if f"{path}.scales" in outlines
    }


def _stored_dtype(config: Mapping[str, Any]) -> mx.Dtype:
    """The type that the checkpoint's floating point weights have, or had before they were quantised."""
    name = config.get("torch_dtype") or config.get("dtype") or config.get("text_config", {}).get("dtype")
    return (mlx_dtype(name) if name in DTYPES else None) or mx.bfloat16
