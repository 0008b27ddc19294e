"""Turn the tensors of GPTQ, AWQ and FP8 checkpoints into MLX's quantised form, or into floating point.

GPTQ and AWQ store ``w = scale * (q - zero)``; MLX's affine form is ``w = scale * q + bias`` with
``bias = -scale * zero``: the same numbers, packed along the input axis of an ``[out, in]`` matrix. Nothing is rounded
again: where ``scale * zero`` needs more bits than the stored scale has, scales and biases become float32.

Formats: the papers and packers of GPTQ (arXiv 2210.17323, "v1" zeros are stored minus one), AWQ (arXiv 2306.00978,
"gemm" order) and block-wise FP8 of DeepSeek-V3 (arXiv 2412.19437).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from qwenvl_mlx.checkpoint.files import some
from qwenvl_mlx.errors import CheckpointError, ConfigError

log = logging.getLogger("qwenvl_mlx.checkpoint")

Weights = dict[str, mx.array]
GROUP_SIZES = (128, 64, 32)  # that MLX's affine kernels take
# One text for all modules: commands show it once, however many batches a file is read in.
FORMLESS = (
    "the checkpoint has groups of weights that MLX has no form for (of reordered inputs, as desc_act makes them, or "
    "of an odd size): they are dequantised to floating point; quantise anew with -q to make them small"
)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds column AWQ_ORDER[i]


def unpack(weights: Weights, config: Mapping[str, Any], dtype: mx.Dtype | None = None) -> Weights:
    """Weights with the quantised modules of ``config`` in MLX's form; lazy but for zeros and group indices.

    Names keep their module's path and get the suffixes ``.weight .scales .biases``. What MLX has no exact form for is
    dequantised, to ``dtype`` or to the type of its scales, and logged. A checkpoint that is not quantised, or already
    in MLX's form, passes unchanged.
    """
    settings = config.get("quantization_config") or {}
    if not isinstance(settings, Mapping):
        raise ConfigError("config.json: quantization_config is no object: fetch it again")
    method = settings.get("quant_method")
    if method is None:
        if any(name.endswith(".qweight") for name in weights):
            raise CheckpointError(
                "the weights are packed as GPTQ or AWQ have them, but nothing says how: config.json needs its "
                "quantization_config, or the folder quantize_config.json (GPTQ) or quant_config.json (AWQ)"
            )
        return weights
    if method == "gptq":
        return _unpack_modules(weights, _gptq(settings), dtype)
    if method == "awq":
        return _unpack_modules(weights, _awq(settings), dtype)
    if method == "fp8":
        return _unpack_fp8(weights, settings, dtype)
    raise ConfigError(f"config.json: quant_method = {method!r} is not known; known: 'gptq', 'awq', 'fp8'")


@dataclass(frozen=True)
class _Layout:
    """How the words of a checkpoint hold its numbers. ``zero_offset``: to add to stored zeros."""

    bits: int
    zero_offset: int
    interleaved: bool  # AWQ: packed along the outputs, in AWQ_ORDER


def _gptq(settings: Mapping[str, Any]) -> _Layout:
    bits = settings.get("bits")
    if bits not in (2, 4, 8):
        raise ConfigError(f"config.json: GPTQ with bits = {bits!r} is not known; known: 2, 4, 8")
    return _Layout(bits, 0 if settings.get("checkpoint_format") == "gptq_v2" else 1, interleaved=False)


def _awq(settings: Mapping[str, Any]) -> _Layout:
    bits, version = settings.get("bits", 4), str(settings.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm":
        raise ConfigError(
            f"config.json: AWQ with bits = {bits!r}, version = {version!r} is not known; known: 4, gemm"
        )
    return _Layout(4, 0, interleaved=True)


def _unpack_modules(weights: Weights, layout: _Layout, dtype: mx.Dtype | None) -> Weights:
    result = {}
    formless = []
    for name, array in weights.items():
        module, _, suffix = name.rpartition(".")
        if f"{module}.qweight" not in weights:
            result[name] = array
        elif suffix == "qweight":
            parts = _unpack_module(module, weights, layout, dtype)
            result.update(parts)
            if f"{module}.scales" not in parts:
                formless.append(module)
        elif suffix not in ("qzeros", "scales", "g_idx"):
            result[name] = array
    if formless:
        log.warning(FORMLESS)
        log.info("dequantised: %s", some(formless))
    return result


def _unpack_module(module: str, weights: Weights, layout: _Layout, dtype: mx.Dtype | None) -> Weights:
    packed, zeros, scales = (_part(weights, module, suffix) for suffix in ("qweight", "qzeros", "scales"))
    words = packed.view(mx.uint32)
    # [out, in * bits / 32]: MLX's own packing
    words = _repack_awq(words) if layout.interleaved else mx.contiguous(words.T)
    inputs, outputs = words.shape[1] * 32 // layout.bits, words.shape[0]
    zero = _unpack_columns(zeros.view(mx.uint32), layout) + layout.zero_offset  # [groups, out]
    if scales.shape != zero.shape or scales.shape[1] != outputs or not len(scales) or inputs % len(scales):
        raise CheckpointError(
            f"{module}: qweight, qzeros and scales do not fit each other: fetch the files again"
        )
    order = weights.get(f"{module}.g_idx")
    group = inputs // len(scales)
    plain = order is None or bool(mx.array_equal(order, mx.arange(inputs, dtype=order.dtype) // group))
    kernel = next((size for size in GROUP_SIZES if group % size == 0), None)
    if plain and kernel:
        return _affine(module, words, scales, zero, group // kernel)
    rows = mx.arange(inputs) // group if order is None else order
    return {f"{module}.weight": _dequantise(module, words, scales, zero, rows, layout.bits, dtype)}


def _part(weights: Weights, module: str, suffix: str) -> mx.array:
    array = weights.get(f"{module}.{suffix}")
    if array is None or array.ndim != 2 or (suffix != "scales" and array.dtype not in (mx.int32, mx.uint32)):
        raise CheckpointError(
            f"{module}.{suffix} is missing or no matrix of the right type: fetch the files again"
        )
    return array


def _affine(module: str, words: mx.array, scales: mx.array, zero: mx.array, repeat: int) -> Weights:
    """MLX's form of a module; ``repeat``: how many of MLX's groups share a scale."""
    powers = (zero & (zero - 1)) == 0  # scale * 2^n has the bits of the scale
    if not bool(mx.all(powers)):
        scales = scales.astype(mx.float32)
    biases = -(scales * zero.astype(scales.dtype))
    parts = {"scales": scales, "biases": biases}
    stored = {
        key: mx.contiguous(mx.repeat(part, repeat, axis=0).T) for key, part in parts.items()
    }  # [out, groups]
    return {f"{module}.weight": words} | {f"{module}.{key}": part for key, part in stored.items()}


def _dequantise(
    module: str,
    words: mx.array,
    scales: mx.array,
    zero: mx.array,
    rows: mx.array,
    bits: int,
    dtype: mx.Dtype | None,
) -> mx.array:
    """Floating point ``[out, in]``; ``rows``: the group of each input."""
    if rows.shape != (words.shape[1] * 32 // bits,) or bool(mx.any((rows < 0) | (rows >= len(scales)))):
        raise CheckpointError(f"{module}.g_idx names groups that are not there: fetch the files again")
    shifts = mx.arange(0, 32, bits, dtype=mx.uint32)
    numbers = ((words[..., None] >> shifts) & (2**bits - 1)).reshape(len(words), -1)  # [out, in]
    exact = scales.astype(mx.float32)
    weight = exact[rows].T * (numbers.astype(mx.float32) - zero.astype(mx.float32)[rows].T)
    result: mx.array = weight.astype(dtype or scales.dtype)
    return result


def _unpack_columns(words: mx.array, layout: _Layout) -> mx.array:
    """Zeros ``[groups, out * bits / 32]`` -> ``[groups, out]``."""
    shifts = mx.arange(0, 32, layout.bits, dtype=mx.uint32)
    numbers = (words[..., None] >> shifts) & (2**layout.bits - 1)
    if layout.interleaved:
        numbers = numbers[..., mx.argsort(mx.array(AWQ_ORDER))]
    columns: mx.array = numbers.reshape(len(words), -1)
    return columns


def _repack_awq(words: mx.array) -> mx.array:
    """Words along the outputs in AWQ's order ``[in, out / 8]`` -> words along the inputs ``[out, in / 8]``.

    Works on whole words, one output of eight at a time: never more than a few times the packed size in memory.
    """
    inputs, columns = words.shape
    if inputs % 8:
        raise CheckpointError(
            f"AWQ weights with {inputs} inputs can't be packed for MLX: it takes multiples of 8"
        )
    rows = words.reshape(inputs // 8, 8, columns)
    places = 4 * mx.arange(8, dtype=mx.uint32)[:, None]
    outputs = []
    for column in range(8):
        nibbles = (rows >> mx.array(4 * AWQ_ORDER.index(column), dtype=mx.uint32)) & 15
        outputs.append(mx.sum(nibbles << places, axis=1))  # [in / 8, out / 8]
    return mx.contiguous(mx.stack(outputs, axis=-1).reshape(inputs // 8, -1).T)


def _unpack_fp8(weights: Weights, settings: Mapping[str, Any], dtype: mx.Dtype | None) -> Weights:
    """``w = w8 * scale`` of its block; the last block of a row or column may be smaller."""
    block = settings.get("weight_block_size") or (None, None)
    suffix = "_scale_inv"
    result = {name: array for name, array in weights.items() if not name.endswith(suffix)}
    for name, scales in weights.items():
        if name.endswith(suffix):
            target = name.removesuffix(suffix)
            if target not in weights:
                raise CheckpointError(f"{name} has no weights to scale: fetch the files again")
            result[target] = _scale_blocks(target, weights[target], scales, tuple(block)).astype(
                dtype or mx.bfloat16
            )
    return result


def _scale_blocks(name: str, weight: mx.array, scales: mx.array, block: tuple[int | None, ...]) -> mx.array:
    values = mx.from_fp8(weight, dtype=mx.float32)
    scales = scales.astype(mx.float32)
    if scales.size == 1:
        return values * scales.reshape(())
    if len(block) != 2 or scales.ndim != weight.ndim:
        raise CheckpointError(f"{name}: its FP8 scales have no block size in config.json: fetch it again")
    for axis, size in zip((-2, -1), block, strict=True):
        if not isinstance(size, int) or size < 1 or scales.shape[axis] != -(-weight.shape[axis] // size):
            raise CheckpointError(
                f"{name}: {scales.shape} FP8 scales do not fit {weight.shape} in blocks of {block}"
            )
    height, width = cast(tuple[int, int], block)
    scales = mx.take(scales, mx.arange(weight.shape[-2]) // height, axis=-2)  # [.., out, blocks of a row]
    if weight.shape[-1] % width:
        return values * mx.take(scales, mx.arange(weight.shape[-1]) // width, axis=-1)
    return (values.reshape(*scales.shape, width) * scales[..., None]).reshape(weight.shape)
