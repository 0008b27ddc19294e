"""What the graphs cost on Metal, counted without one: a slower graph is a failing test.

A count that rose needs a reason. One that fell is written down by ``python -m benchmarks.launches``.
"""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from benchmarks.counts import Cost, count, metal_view
from benchmarks.launches import NAMES, built, compiled, depths, kept, measure, narrow
from qwenvl_mlx.layers.cache import Cache
from qwenvl_mlx.models import model_class
from qwenvl_mlx.sizes import SIZES, small_shapes

DENSE = ("Qwen-VL-Chat", "Qwen2-VL-7B", "Qwen2.5-VL-7B", "Qwen3-VL-8B")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_graphs_cost_what_is_written_down(name: str) -> None:
    assert measure([name])[name] == kept()[name]


@pytest.mark.parametrize("name", DENSE)
def test_a_decoder_layer_takes_few_kernels(name: str) -> None:
    layers, _ = depths(name)
    for kind, most in (("bf16", 13), ("4 bits", 15)):
        assert kept()[name][f"decode {kind}"]["launches"] <= most * layers
        assert kept()[name][f"prefill {kind}"]["launches"] <= most * layers


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize(("bits", "most"), [(None, 13), (4, 15)])
def test_a_layer_of_a_compiled_step_takes_few_kernels(name: str, bits: int | None, most: int) -> None:
    """Even when an update at a place that the device knows is counted as three, as if it had to copy the buffer."""
    assert compiled_cost(name, 4, bits).launches - compiled_cost(name, 3, bits).launches <= most


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize(("bits", "most"), [(None, 21), (4, 23)])
def test_a_layer_of_a_compiled_step_has_few_nodes(name: str, bits: int | None, most: int) -> None:
    """Views launch nothing, but the host makes them for every token."""
    assert compiled_cost(name, 4, bits).nodes - compiled_cost(name, 3, bits).nodes <= most


def compiled_cost(name: str, layers: int, bits: int | None) -> Cost:
    config = narrow(SIZES[name])
    config.get("text_config", config)["num_hidden_layers"] = layers
    with metal_view():
        model, cache = built(config, bits=bits)
        return compiled(model, cache)


@pytest.mark.parametrize("name", NAMES)
def test_a_vision_block_takes_few_kernels_at_any_size(name: str) -> None:
    _, blocks = depths(name)
    for size in ("448x448", "1024x1024"):
        assert kept()[name][f"picture {size}"]["launches"] <= 14 * blocks


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", small_shapes())
def test_a_decoded_token_moves_little_but_weights_and_cache(name: str, bits: int | None) -> None:
    with metal_view():
        model = language_model(name, bits)
        cache = filled(model, 1000)
        cost = count(lambda tokens: model.decode(tokens, copy.deepcopy(cache)), mx.array([[5]]))
    weights = sum(array.nbytes for _, array in tree_flatten(model.language_model.parameters()))
    needed = weights + cache.nbytes * 1000 // 1024  # tied: the embeddings are read as the output layer
    assert needed <= cost.bytes_moved <= 1.03 * needed


def language_model(name: str, bits: int | None) -> Any:
    """The small shape in bfloat16, as it is loaded; its vision tower is never computed."""
    config = small_shapes()[name]
    model = model_class(config)(config)
    model.set_dtype(mx.bfloat16)
    if bits:
        nn.quantize(model.language_model, group_size=64, bits=bits)
    model.language_model.apply_to_modules(lambda _, part: getattr(part, "prepare", int)())
    mx.eval(model.language_model.parameters())
    return model


def filled(model: Any, length: int) -> Cache:
    """A cache of so many tokens, all zeros."""
    cache: Cache = model.make_cache()
    shape = (1, model.text.kv_heads, 1024, model.text.head_size)
    for layer in cache:
        layer.keys, layer.values = (mx.zeros(shape, mx.bfloat16) for _ in range(2))
        layer.offset = length
    mx.eval([(layer.keys, layer.values) for layer in cache])
    return cache
