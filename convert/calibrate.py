"""Calibrated quantisation: GPTQ, on activations that texts and pictures cause in the source.

Columns of a matrix are rounded one after the other, and what rounding one has changed in the outputs is made up for
by the columns not yet rounded (arXiv 2210.17323). The grid of each group is MLX's own, so the result is an ordinary
affine module. Needs the whole source in memory, unlike every other conversion.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from tqdm import tqdm

from qwenvl_mlx.checkpoint import Weights
from qwenvl_mlx.checkpoint.loading import build, fill, mlx_dtype, read_all
from qwenvl_mlx.convert.options import Settings
from qwenvl_mlx.convert.quality import fits_memory, working_dtype
from qwenvl_mlx.convert.transform import Plan
from qwenvl_mlx.errors import ConfigError
from qwenvl_mlx.media import Prompt
from qwenvl_mlx.models.base import VisionLanguageModel

BITS = (4, 8)  # whose numbers fill words evenly
DAMPING = 0.01  # of the mean diagonal: keeps the factorisation stable where prompts are few
BUDGET = 4_000_000_000  # bytes of second moments in memory at a time; more modules need more passes


class Recorder(nn.Module):
    """Stands in for a linear layer, and sums the second moments ``[in, in]`` of its inputs while it is asked to."""

    def __init__(self, layer: nn.Linear, number: int) -> None:
        super().__init__()
        self.weight = layer.weight
        if "bias" in layer:
            self.bias = layer.bias
        self.bits = number  # no two alike: layers that differ in it are not joined by prepare()
        self._original = layer.weight
        self._moments: mx.array | None = None
        self._recording = False

    def __call__(self, x: mx.array) -> mx.array:
        if self._recording:
            rows = x.astype(mx.float32).reshape(-1, x.shape[-1])
            moments = rows.T @ rows
            self._moments = moments if self._moments is None else self._moments + moments
        y = x @ self.weight.T
        return y + self.bias if "bias" in self else y

    def start(self) -> None:
        self._recording = True

    def stop(self) -> tuple[mx.array, mx.array | None]:
        """The layer's weights as stored, and what was recorded; the latter is forgotten here."""
        moments, self._moments, self._recording = self._moments, None, False
        return self._original, moments


def calibrate(plan: Plan, source: Path, prompts: Sequence[Prompt]) -> dict[str, Weights]:
    """Quantised tensors of each module that GPTQ can do, by its path; the others are left to plain rounding."""
    if not fits_memory(plan):
        raise ConfigError(
            "calibration needs the whole source in memory, which this machine lacks: leave it out"
        )
    model = build(plan.config)
    fill(model, read_all(source, plan.cls, plan.config, mlx_dtype(working_dtype())), source)
    recorders = _install(model, plan)
    model.prepare()
    mx.eval(model.parameters())
    done: dict[str, Weights] = {}
    with tqdm(total=len(recorders), desc="calibrating", unit="module", disable=None) as bar:
        for paths in _passes(recorders):
            _record(model, [recorders[path] for path in paths], prompts)
            for path in paths:
                weight, moments = recorders[path].stop()
                if moments is not None and moments.shape[0] == weight.shape[1]:
                    dtype = plan.outlines[f"{path}.scales"].dtype
                    done[path] = gptq(path, weight, moments, plan.wanted[path], dtype)
                bar.update()
    return done


def gptq(path: str, weight: mx.array, moments: mx.array, settings: Settings, dtype: mx.Dtype) -> Weights:
    """Round ``weight`` ``[out, in]`` given the second moments of its inputs; ``dtype``: of scales and biases."""
    rest = weight.astype(mx.float32)
    factor = _inverse_factor(moments)
    group, numbers, scales, biases = settings.group_size, [], [], []
    for begin in range(0, rest.shape[1], group):
        end = begin + group
        _, scale, bias = mx.quantize(rest[:, begin:end], group, settings.bits)
        scale, bias = (part.astype(dtype) for part in (scale, bias))
        rounded, errors = _round_group(
            rest[:, begin:end], factor[begin:end, begin:end], scale, bias, settings.bits
        )
        rest = rest.at[:, end:].add(-(errors @ factor[begin:end, end:]))
        numbers.append(rounded)
        scales.append(scale)
        biases.append(bias)
        mx.eval(rest, numbers[-1])
    parts = (_pack(mx.concatenate(numbers, axis=1), settings.bits), *map(_joined, (scales, biases)))
    mx.eval(parts)
    return {f"{path}.{kind}": part for kind, part in zip(("weight", "scales", "biases"), parts, strict=True)}


def _round_group(
    columns: mx.array, factor: mx.array, scale: mx.array, bias: mx.array, bits: int
) -> tuple[mx.array, mx.array]:
    """Numbers of one group, and the error of each column in units of its own weight in the outputs."""
    scale, bias = scale.astype(mx.float32), bias.astype(mx.float32)
    safe = mx.where(scale == 0, 1, scale)
    numbers, errors = [], []
    for at in range(columns.shape[1]):
        column = columns[:, at : at + 1]
        number = mx.clip(mx.round((column - bias) / safe), 0, 2**bits - 1)
        error = (column - (number * scale + bias)) / factor[at, at]
        columns = columns - error @ factor[at : at + 1]
        numbers.append(number.astype(mx.uint32))
        errors.append(error)
    return _joined(numbers), _joined(errors)


def _inverse_factor(moments: mx.array) -> mx.array:
    """The upper Cholesky factor of the inverse of the damped moments."""
    with mx.stream(mx.cpu):  # MLX factorises there only
        size = moments.shape[0]
        damping = DAMPING * mx.mean(mx.diag(moments)) + 1e-8
        lower = mx.linalg.cholesky(moments + damping * mx.eye(size))
        return mx.linalg.cholesky(mx.linalg.cholesky_inv(lower), upper=True)


def _pack(numbers: mx.array, bits: int) -> mx.array:
    fields = numbers.reshape(len(numbers), -1, 32 // bits)
    return mx.sum(fields << mx.arange(0, 32, bits, dtype=mx.uint32), axis=-1)


def _joined(columns: list[mx.array]) -> mx.array:
    return mx.concatenate(columns, axis=1)


def _install(model: VisionLanguageModel, plan: Plan) -> dict[str, Recorder]:
    """Put a recorder in the place of every linear layer; give those of modules that GPTQ shall round."""
    recorders: dict[str, Recorder] = {}

    def record(path: str, module: Any) -> Any:
        if not isinstance(module, nn.Linear):
            return module
        recorders[path] = Recorder(module, len(recorders))
        return recorders[path]

    leaves = model.leaf_modules()
    model.update_modules(tree_map_with_path(record, leaves, is_leaf=nn.Module.is_module))
    wanted = {path: plan.wanted[path] for path in recorders if path in plan.wanted}
    return {path: recorders[path] for path, s in wanted.items() if s.mode == "affine" and s.bits in BITS}


def _passes(recorders: dict[str, Recorder]) -> Iterator[list[str]]:
    """Modules in lots whose moments fit the budget together."""
    lot: list[str] = []
    room = BUDGET
    for path, recorder in recorders.items():
        size = 4 * recorder.weight.shape[1] ** 2
        if lot and size > room:
            yield lot
            lot, room = [], BUDGET
        lot.append(path)
        room -= size
    if lot:
        yield lot


def _record(model: VisionLanguageModel, recorders: list[Recorder], prompts: Sequence[Prompt]) -> None:
    for recorder in recorders:
        recorder.start()
    for prompt in prompts:
        logits = model.logits(prompt)
        mx.eval(logits, [recorder._moments for recorder in recorders if recorder._moments is not None])
