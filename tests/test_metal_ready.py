"""What would fail or crawl on a Mac's GPU, found without one: every generation's forward passes are traced.

Tracing itself proves the first point: it is an error to look at a value (``item``, numpy, ``mx.eval``) inside it, so
no forward pass waits for the device. The traced graph then shows every primitive and every type.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import qwenvl_mlx
from benchmarks.launches import NAMES, narrow
from qwenvl_mlx.layers.cache import Cache
from qwenvl_mlx.media import Features, Media
from qwenvl_mlx.models import model_class
from qwenvl_mlx.sizes import SIZES

# All have Metal kernels. A new one is added after a look at mlx/backend/metal; the linalg factorisations have none.
ON_THE_GPU = """
Abs Add AddMM Arange ArgPartition ArgReduce ArgSort AsStrided AsType BitwiseBinary Broadcast
BroadcastAxes Compiled Concatenate Contiguous Convolution Copy Cos CustomTransforms Depends Divide DivMod
DynamicSlice DynamicSliceUpdate Equal Erf Exp ExpandDims Flatten FloorDivide Full Gather GatherAxis GatherMM
GatherQMM Greater GreaterEqual Less LessEqual Log Log1p LogAddExp LogicalAnd LogicalNot LogicalOr Matmul
Maximum Minimum Multiply Negative NotEqual Pad Partition Power QuantizedMatmul Reduce Remainder Reshape
Round Scan Scatter ScatterAxis Select Sigmoid Sign Sin Slice SliceUpdate Softmax Sort Split Sqrt Square
Squeeze StopGradient Subtract Tanh Transpose Unflatten View RMSNorm LayerNorm RoPE
ScaledDotProductAttention GatedDelta
"""
NOT_ON_THE_GPU = {mx.float64, mx.complex64}
FUSED_FULL = {64, 72, 80, 96, 128}  # head sizes of the fused kernel for more than 8 queries
FUSED_VECTOR = {64, 96, 128, 256}  # and of that for fewer
MLX_FALLS_BACK = {256}  # Qwen3.5's heads in a prefill: MLX itself computes those in separate steps

PASSES = ("encode", "prefill", "decode", "decode a batch")

Trace = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Traced:
    primitives: set[str]
    dtypes: set[mx.Dtype]
    attention: set[tuple[int, int, int]]  # queries, size of a key, size of a value


@cache
def traced(name: str, which: str) -> Traced:
    """One forward pass of a small model with the published head sizes."""
    attention: set[tuple[int, int, int]] = set()
    fused = mx.fast.scaled_dot_product_attention

    def watched(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
        attention.add((q.shape[-2], k.shape[-1], v.shape[-1]))
        return fused(q, k, v, **options)

    function, argument = passes(name)[which]
    records: Trace = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx.fast, "scaled_dot_product_attention", watched)
        patch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
        patch.setattr(mx, "contiguous", lambda x, **_: x)  # only a layout, and not exportable
        mx.disable_compile()  # a fused kernel can't be exported: its parts are
        try:
            mx.export_function(records.append, function, argument)
        finally:
            mx.enable_compile()
    nodes = [record for record in records if record["type"] == "primitive"]
    dtypes = {tensor[2] for node in nodes for tensor in (*node["inputs"], *node["outputs"])}
    return Traced({node["name"] for node in nodes}, dtypes, attention)


@cache
def passes(name: str) -> dict[str, tuple[Callable[[mx.array], Any], mx.array]]:
    """The four forward passes as functions of one array, and that array."""
    config = shallow(narrow(SIZES[name]))
    model = model_class(config)(config)
    model.set_dtype(mx.bfloat16)
    model.prepare()
    mx.eval(model.parameters())
    ids, media = picture(config)
    features = model.encode([media])[0]
    patches, embeddings = mx.array(media.patches), features.embeddings
    mx.eval(patches, features.embeddings, features.deepstack)

    def encode(rows: mx.array) -> tuple[mx.array, ...]:
        made = model.encode([dataclasses.replace(media, patches=rows)])[0]
        return (made.embeddings, *made.deepstack)

    def prefill(rows: mx.array) -> mx.array:
        embedded = model.embed(ids, [Features(rows, features.deepstack)], [media])
        return model(embedded, model.make_cache(), last_only=True)

    def decode(tokens: mx.array) -> mx.array:
        return model.decode(tokens, filled(model, 3))

    def decode_batch(tokens: mx.array) -> mx.array:
        return model.decode(tokens, Cache.merge([filled(model, 3), filled(model, 5)]))

    one, two = mx.zeros((1, 1), mx.int32), mx.zeros((2, 1), mx.int32)
    mx.eval(one, two)
    functions = ((encode, patches), (prefill, embeddings), (decode, one), (decode_batch, two))
    return dict(zip(PASSES, functions, strict=True))


def shallow(config: dict[str, Any]) -> dict[str, Any]:
    """Four layers of each kind show every primitive."""
    vision, text = config.get("vision_config") or config["visual"], config.get("text_config", config)
    vision["layers" if "layers" in vision else "depth"] = text["num_hidden_layers"] = 4
    if "layer_types" in text:
        text["layer_types"] = text["layer_types"][:4]
    vision |= {key: [1, 3] for key in ("fullatt_block_indexes", "deepstack_visual_indexes") if key in vision}
    return config


def filled(model: Any, length: int) -> Cache:
    """A cache after a few tokens. Nothing is evaluated: MLX has no half-precision experts on the CPU."""
    state: Cache = model.make_cache()
    model(model.embed([1] * length, [], []), state)
    return state


def picture(config: dict[str, Any]) -> tuple[list[int], Media]:
    """A prompt with one picture, as small as the generation allows."""
    if config["model_type"] == "qwen":
        vision = config["visual"]
        start, size = vision["image_start_id"], vision["image_size"]
        side = size // vision["patch_size"]
        ids = [1, start, *[2] * 256, start + 1, 3]
        return ids, Media("image", np.zeros((3, size, size), np.float32), (1, side, side))
    vision, grid = config["vision_config"], (1, 8, 12)
    channels = vision.get("in_channels", vision.get("in_chans", 3))
    row = channels * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    tokens = [config["image_token_id"]] * (8 * 12 // vision["spatial_merge_size"] ** 2)
    ids = [1, config["vision_start_token_id"], *tokens, config["vision_end_token_id"], 2]
    return ids, Media("image", np.zeros((8 * 12, row), np.float32), grid)


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("name", NAMES)
def test_forward_passes_run_on_the_gpu_without_waiting(name: str, which: str) -> None:
    trace = traced(name, which)
    unknown = {primitive for primitive in trace.primitives if primitive not in ON_THE_GPU.split()}
    assert not unknown
    assert not trace.dtypes & NOT_ON_THE_GPU
    assert mx.bfloat16 in trace.dtypes


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("name", NAMES)
def test_attention_takes_the_fused_kernels(name: str, which: str) -> None:
    assert traced(name, which).attention
    for queries, key, value in traced(name, which).attention:
        assert key == value
        assert key in (FUSED_FULL | MLX_FALLS_BACK if queries > 8 else FUSED_VECTOR), (queries, key)


@pytest.mark.parametrize("look", [lambda x: x.item(), np.array, lambda x: x.tolist(), mx.eval])
def test_tracing_catches_a_look_at_a_value(look: Callable[[mx.array], Any]) -> None:
    def waits(x: mx.array) -> mx.array:
        look(x.sum())
        return x

    with pytest.raises((RuntimeError, ValueError), match="eval"):
        mx.export_function(lambda _: None, waits, mx.zeros(2))


def test_nothing_is_tied_to_the_cpu() -> None:
    """Models, layers and engine send no work to a device by name, and have no 64-bit floats."""
    root = Path(qwenvl_mlx.__file__).parent
    for path in [*root.glob("models/*.py"), *root.glob("layers/*.py"), *root.glob("engine/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            given = (
                [*node.args, *(word.value for word in node.keywords)] if isinstance(node, ast.Call) else []
            )
            names = {ast.unparse(value) for value in (node, *given) if isinstance(value, ast.Attribute)}
            assert not names & {"mx.float64", "mx.complex64", "mx.linalg"}, f"{path.name}:{node.lineno}"
            assert "mx.cpu" not in map(ast.unparse, given), f"{path.name}:{node.lineno}"
