"""Compiled steps say what ``model.decode`` says, whatever the generation, and cost less."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from fakes import FakeModel, FakeProcessor

from benchmarks.launches import NAMES, narrow
from qwenvl_mlx.engine import Engine, EngineOptions, GenerationOptions
from qwenvl_mlx.engine import step as steps
from qwenvl_mlx.engine.step import CompiledStep, Decoding, capacity
from qwenvl_mlx.layers.cache import Cache
from qwenvl_mlx.models import model_class
from qwenvl_mlx.sizes import SIZES

PROMPT = list(range(1, 20))


def made(name: str, layers: int = 4, *, bits: int | None = None, trained: int = 2048) -> tuple[Any, Cache]:
    """A narrow model of few layers, random weights in float32, and its cache after a prompt."""
    config = narrow(SIZES[name])
    text = config.get("text_config", config)
    text["num_hidden_layers"] = layers
    text.pop("layer_types", None)
    if name == "Qwen-VL-Chat":
        config["seq_length"] = trained
    mx.random.seed(3)
    model = model_class(config)(config)
    if bits:
        nn.quantize(model.language_model, group_size=64, bits=bits)
    model.prepare()
    cache = model.make_cache()
    mx.eval(model.parameters(), model(model.embed(PROMPT, [], []), cache=cache, last_only=True), cache.arrays)
    return model, cache


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "STEP", 8)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_decode(name: str, bits: int | None) -> None:
    model, cache = made(name, bits=bits)
    plain, decoding = copy.deepcopy(cache), Decoding(CompiledStep(model), cache)
    for token in range(30):  # buffers grow several times
        right = model.decode(mx.array([[token]]), plain)
        close(decoding(mx.array([[token]])), right)
    back = decoding.cache()
    assert back.offset == plain.offset == len(PROMPT) + 30
    close(model.decode(mx.array([[5]]), back), model.decode(mx.array([[5]]), plain))


@pytest.mark.parametrize("name", [name for name in NAMES if "3.5" not in name])
def test_several_tokens_and_back(name: str) -> None:
    """A guess: its tokens at once, then the wrong ones are forgotten."""
    model, cache = made(name)
    plain, decoding = copy.deepcopy(cache), Decoding(CompiledStep(model), cache)
    for count in (1, 5, 1, 3, 1):
        tokens = mx.array([list(range(count))])
        close(decoding(tokens), model.decode(tokens, plain))
        plain.trim(count // 2)
        decoding.trim(count // 2)
    close(decoding(mx.array([[7]])), model.decode(mx.array([[7]]), plain))


def test_logn_beyond_the_trained_length() -> None:
    model, cache = made("Qwen-VL-Chat", trained=25)
    plain, decoding = copy.deepcopy(cache), Decoding(CompiledStep(model), cache)
    for token in range(20):
        close(decoding(mx.array([[token]])), model.decode(mx.array([[token]]), plain))


def close(a: mx.array, b: mx.array) -> None:
    np.testing.assert_allclose(np.array(a), np.array(b), atol=2e-5)


def test_a_graph_is_built_once_for_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    plain = FakeModel.decode
    monkeypatch.setattr(
        FakeModel, "decode", lambda self, tokens, cache: (built.append(1), plain(self, tokens, cache))[1]
    )
    model = FakeModel()
    options = GenerationOptions(max_tokens=200, ignore_eos=True)
    with Engine(model, FakeProcessor(), EngineOptions(prompt_lookup=False)) as engine:
        built.clear()
        first = engine.generate("hello", options)
        once = len(built)
        assert engine.generate("hello", options).tokens == first.tokens
    assert once <= 2 + len({capacity(length) for length in range(220)}) < 40
    assert len(built) == once + 1  # the step after the first token is not compiled


def test_the_buffers_are_written_in_place() -> None:
    model, cache = made("Qwen2.5-VL-7B", layers=2)
    for layer in cache:
        layer.keys, layer.values = (mx.zeros((1, 1, 1 << 14, 128)) for _ in range(2))
        layer.offset = 16_000
    decoding = Decoding(CompiledStep(model), cache)
    token = mx.array([[5]])
    mx.eval(decoding(token))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(3):
        token = mx.argmax(decoding(token)[:, -1], axis=-1)[None]
        mx.async_eval(token)
    mx.eval(token)
    assert mx.get_peak_memory() - before < 4e6  # each of the two buffers has 17 MB


def test_nothing_grows_with_the_answer() -> None:
    model, cache = made("Qwen3-VL-8B", layers=2)
    decoding = Decoding(CompiledStep(model), cache)
    used = []
    for token in range(60):
        mx.eval(decoding(mx.array([[token]])))
        used.append(mx.get_active_memory())
    rows = sum(array.nbytes for array in decoding.cache().arrays)
    assert used[-1] - used[1] <= rows


def test_buffers_are_of_few_sizes_and_hardly_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "STEP", 256)
    sizes = {capacity(length) for length in range(1, 32_768)}
    assert len(sizes) < 48
    assert all(length < capacity(length) <= max(length * 1.13, length + 256) for length in range(1, 40_000))


def test_a_model_over_several_machines_and_quantised_caches_are_left_alone() -> None:
    model, cache = made("Qwen3-VL-8B", layers=2)
    step = CompiledStep(model)
    assert step.suits(cache)
    assert not step.suits(Cache.merge([cache, cache]))
    quantised = copy.deepcopy(cache)
    quantised[1] = quantised[1].to_quantized(group_size=64, bits=8)
    assert not step.suits(quantised)
    model.sharded = True
    assert not step.suits(cache)
