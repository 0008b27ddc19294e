"""Work dealt out over a processor's cores gives what one core gives, in every generation."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import test_later_models as later_models
from helpers import reference
from mlx.utils import tree_flatten
from qwen_vl_cases import goldens, load
from qwen_vl_cases import prompt as original_prompt
from test_later_models import build, close, mixed

from benchmarks.parity_table import GENERATIONS
from qwenvl_mlx.engine.kv import cache_maker, kv_cost
from qwenvl_mlx.engine.step import CompiledStep, Decoding
from qwenvl_mlx.layers import cores, fused, linear, over_cores
from qwenvl_mlx.layers.cores import Turns, by_rows
from qwenvl_mlx.layers.decoder import add_mlp
from qwenvl_mlx.layers.delta_net import GatedDeltaNet
from qwenvl_mlx.layers.mlp import MLP
from qwenvl_mlx.layers.over_cores import parts_of
from qwenvl_mlx.media import Prompt
from qwenvl_mlx.models.base import VisionLanguageModel
from qwenvl_mlx.models.qwen_vl import Model

Take = Callable[[int], None]


@pytest.fixture
def take(monkeypatch: pytest.MonkeyPatch) -> Iterator[Take]:
    """Let so many cores be free. Nothing is too small for them."""

    def free(count: int) -> None:
        monkeypatch.setattr(cores, "_free", lambda: count)
        cores._streams.cache_clear()

    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    monkeypatch.setattr(cores, "_alone", threading.Event())
    for module, least in ((cores, "ENOUGH"), (linear, "LARGE"), (fused, "LEAST"), (over_cores, "WORTH")):
        monkeypatch.setattr(module, least, 1)
    free(3)
    yield free
    cores._streams.cache_clear()
    mx.set_default_device(device)


def here() -> mx.Stream:
    return mx.default_stream(mx.default_device())


def test_parts_run_on_streams_in_turn(take: Take) -> None:
    before, seen = here(), []

    def part(x: mx.array, more: mx.array) -> mx.array:
        seen.append(here())
        assert cores.cores() == 1  # a part is not cut again
        return x + more

    turns = Turns()
    parts = [turns(part, mx.array([index]), mx.array([10])) for index in range(5)]
    assert mx.concatenate(parts).tolist() == [10, 11, 12, 13, 14]
    assert seen[0] == seen[3] == before != seen[1] == seen[4] != seen[2] != before
    assert here() == before
    assert cores.cores() == 3


def test_a_failing_part_leaves_nothing_behind(take: Take) -> None:
    def fail(_: mx.array) -> mx.array:
        raise ValueError("no")

    before, turns = here(), Turns()
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            turns(fail, mx.zeros(1))
    assert (here(), cores.cores()) == (before, 3)


@pytest.mark.parametrize(
    ("count", "free", "most", "parts"),
    [
        (30, 1, 30, [30]),
        (30, 1, 7, [6] * 5),
        (30, 3, 30, [10] * 3),
        (30, 3, 7, [5] * 6),
        (2, 3, 2, [2]),
    ],
)
def test_rows_in_parts_give_what_all_rows_give(
    count: int, free: int, most: int, parts: list[int], take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(free)
    x, seen = mx.random.normal((count, 4)), []

    def total(rows: mx.array, others: mx.array) -> mx.array:
        seen.append(len(rows))
        return rows + others

    assert mx.array_equal(by_rows(total, x, x, most=most), x * 2)
    assert seen == parts
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    by_rows(total, x, x, most=most)
    assert seen[len(parts) :] == [count]


@pytest.mark.parametrize(
    ("allowed", "library", "free"),
    [
        ({0}, {}, 1),
        ({0, 1}, {}, 2),
        ({0, 1}, {"bli_thread_get_num_threads": lambda: 2}, 1),
        ({0, 1}, {"bli_thread_get_num_threads": lambda: -1}, 2),  # not told
        ({0, 1, 2, 3}, {"openblas_get_num_threads": lambda: 2}, 2),
        ({0, 1}, {"openblas_get_num_threads": lambda: 8}, 1),
        (set(range(64)), {}, cores.MOST),
        (None, {}, 1),  # macOS
    ],
)
def test_cores_that_products_leave_idle(
    allowed: set[int] | None, library: dict[str, Any], free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores.ctypes, "CDLL", lambda _: SimpleNamespace(**library))
    monkeypatch.setattr(cores, "_alone", threading.Event())
    if allowed is None:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    else:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed, raising=False)
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    cores._streams.cache_clear()
    try:
        assert cores.cores() == free
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
        assert cores.cores() == 1
    finally:
        cores._streams.cache_clear()
        mx.set_default_device(device)


@pytest.mark.parametrize("kind", ["plain", "biased", "quantised", "table", "quantised table"])
def test_outputs_in_parts_are_the_outputs(kind: str, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    mx.random.seed(0)
    layer: Any = nn.Embedding(96, 64) if "table" in kind else nn.Linear(64, 96, bias=kind == "biased")
    layer = layer.to_quantized(group_size=32, bits=4) if "quantised" in kind else layer
    x, residual = mx.random.normal((1, 5, 64)), mx.random.normal((1, 5, 96))
    seen = set()

    def product(part: nn.Module, some: slice) -> mx.array:
        seen.add((here(), len(part.weight)))
        out: mx.array = part.as_linear(x) if "table" in kind else part(x)
        return out + residual[..., some]

    wanted = (layer.as_linear(x) if "table" in kind else layer(x)) + residual
    np.testing.assert_allclose(linear.by_outputs(product, layer, x), wanted, atol=1e-5)
    assert len(seen) == 3
    assert {outputs for _, outputs in seen} == {32}
    assert len(layer.weight) == 96
    if "table" in kind:
        return
    on, taken = linear.on, []
    monkeypatch.setattr(linear, "on", lambda core: (taken.append(core), on(core))[1])
    np.testing.assert_allclose(linear.apply(layer, x) + residual, wanted, atol=1e-5)
    np.testing.assert_allclose(linear.add_linear(residual, layer, x), wanted, atol=1e-5)
    assert taken == [0, 1, 2] * 2


def test_small_products_are_left_whole(take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "LARGE", 2 * 64 * 96)
    layer, seen = nn.Linear(64, 96), []

    def note(part: nn.Module, some: slice) -> mx.array:
        seen.append(part)
        return mx.zeros(1)

    linear.by_outputs(note, layer, mx.zeros((1, 64)))
    assert seen == [layer]
    linear.by_outputs(note, layer, mx.zeros((2, 64)))
    assert len(seen) == 4
    gate = nn.QuantizedLinear(
        64, 1, group_size=32
    )  # MLX would divide by its outputs, which some cores had none of
    assert linear.apply(gate, mx.ones((200, 64))).shape == (200, 1)


def test_few_parts_are_in_memory_at_once(take: Take) -> None:
    def deep(rows: mx.array) -> mx.array:
        inner = rows @ wide
        for _ in range(20):  # more than MLX begins at once
            inner = mx.abs(inner)
        return inner @ wide.T

    take(2)
    x, wide = mx.random.normal((64, 16)), mx.random.normal((16, 20_000))
    mx.eval(x, wide)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(by_rows(deep, x, most=4))
    assert mx.get_peak_memory() - before < 64 * 20_000 * 4 / 2


@pytest.mark.parametrize("queries", [1, 50])
def test_heads_are_dealt_out(queries: int, take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    """As few as there are, and those of one query without a copy of all keys."""
    monkeypatch.setattr(fused, "exps_pay", lambda *_: True)  # as on the processors that need it
    if queries == 1:
        monkeypatch.delattr(mx, "contiguous")
    q, k = mx.random.normal((1, 6, queries, 32)), mx.random.normal((1, 3, 50, 32))
    seen = set()
    whole = mx.fast.scaled_dot_product_attention(q, k, k, scale=0.2, mask=None)
    on = cores.on
    monkeypatch.setattr(cores, "on", lambda core: (seen.add(core), on(core))[1])
    assert mx.abs(fused.attend(q, k, k, scale=0.2) - whole).max() < 1e-5
    assert seen == {0, 1, 2}


class Sum(nn.Linear):
    """A layer that does more than its weights say."""


def test_other_layers_are_left_whole(take: Take) -> None:
    seen = []

    def note(part: nn.Module, some: slice) -> mx.array:
        seen.append((part, some))
        return mx.zeros(1)

    layer = Sum(4, 4)
    linear.by_outputs(note, layer, mx.zeros((1, 4)))
    assert seen == [(layer, slice(None))]


def made(generation: str) -> tuple[VisionLanguageModel, Prompt]:
    """A model for the cores that are free now, and a prompt with a picture."""
    if generation == "qwen_vl":
        original = load("tiny_chat")
        return original, original_prompt(original, goldens("tiny_chat")["img2"]["ids"][0])
    model = build(generation, text={"num_key_value_heads": 2})
    return model, mixed(model, generation)


def layers(model: VisionLanguageModel) -> list[tuple[Any, Any]]:
    """Mixer and feed-forward part of each decoder layer."""
    body = model.language_model.model
    return (
        [(one.attn, one.mlp) for one in body.h]
        if "h" in body
        else [(one[one.mixer], one.mlp) for one in body.layers]
    )


def watch(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Which cores took pieces of attention, rows, outputs of products and parts of decoder layers."""
    used: dict[str, set[str]] = {}

    class Watched(Turns):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind = kind

        def __call__(self, part: Callable[..., mx.array], *arrays: mx.array) -> mx.array:
            def noted(*given: mx.array) -> mx.array:
                used.setdefault(self.kind, set()).add(str(here()))
                return part(*given)

            return super().__call__(noted, *arrays)

    def watched(core: int) -> Any:
        used.setdefault("parts", set()).add(str(core))
        return on(core)

    on = over_cores.on
    monkeypatch.setattr(fused, "Turns", lambda: Watched("attention"))
    monkeypatch.setattr(cores, "Turns", lambda: Watched("rows"))
    monkeypatch.setattr(
        linear, "on", lambda core: (used.setdefault("outputs", set()).add(str(core)), on(core))[1]
    )
    monkeypatch.setattr(over_cores, "on", watched)
    return used


@pytest.mark.parametrize("generation", [*GENERATIONS, "qwen_vl"])
def test_models_compute_the_same_on_several_cores(
    generation: str, take: Take, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = watch(monkeypatch)
    found = []
    for count in (1, 2, 3):  # heads are cut for two at most
        take(count)
        model, asked = made(generation)
        mixers, mlps = (
            [len(parts_of(module)) for module in kind] for kind in zip(*layers(model), strict=True)
        )
        assert set(mlps) == {count if generation == "qwen_vl" else min(count, 2)}
        assert mixers == [
            1 if isinstance(mixer, GatedDeltaNet) else min(count, 2) for mixer, _ in layers(model)
        ]
        used.clear()
        features = model.encode(asked.media)
        assert {kind: len(streams) for kind, streams in used.items()} == (
            {"attention": 1} if count == 1 else {"attention": count, "rows": count, "outputs": count}
        )
        used.clear()
        embedded, cache = model.embed(asked.input_ids, features, asked.media), model.make_cache()
        assert len(cache) == sum(mixers)
        first = model(embedded, cache, last_only=True)
        assert len(used.get("parts", {0})) == mlps[0]
        assert len(used.get("outputs", {0})) == count
        mx.eval(cache.arrays)
        decoding = Decoding(CompiledStep(model), cache)
        steps = [decoding(mx.array([[token]])) for token in (3, 4)]
        mx.eval(steps)
        more = model.decode(mx.array([[5, 6]]), decoding.cache())
        found.append([*(item.embeddings for item in features), first, *steps, more])
    for several in found[1:]:
        for one, other in zip(found[0], several, strict=True):
            assert close(one, other)


@pytest.mark.parametrize("generation", [*GENERATIONS, "qwen_vl"])
def test_parts_hold_what_the_whole_holds(generation: str, take: Take) -> None:
    """Nothing twice but what each needs: norms, routers, the gate of a shared expert. So do their caches."""

    def large(model: VisionLanguageModel) -> int:
        arrays = dict(tree_flatten(model.language_model.parameters())).items()
        return sum(array.size for name, array in arrays if array.ndim > 1 and "gate.weight" not in name)

    sizes = []
    for count in (1, 2, 4):
        take(count)
        model, _ = made(generation)
        cost = kv_cost(model, None)
        sizes.append((large(model), cost.token, cost.fixed))
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(
    "check",
    [
        later_models.test_chunks_of_a_prompt_are_the_prompt,
        later_models.test_last_only_is_the_last_of_all,
        later_models.test_joined_sequences_decode_as_alone,
        later_models.test_padding_changes_nothing,
        later_models.test_texts_are_read_together_as_alone,
        later_models.test_cached_media_need_no_features,
    ],
)
def test_parts_do_what_a_whole_model_does(check: Callable[..., None], generation: str, take: Take) -> None:
    take(2)
    model, _ = made(generation)
    assert {len(parts_of(mlp)) for _, mlp in layers(model)} == {2}
    check(model, generation)


@pytest.mark.parametrize(
    ("kind", "generation"),
    [(kind, generation) for kind in (4, "mixed") for generation in GENERATIONS]
    # rounding may choose other experts
    + [("half", generation) for generation in GENERATIONS if "moe" not in generation],
)
def test_parts_of_quantised_and_half_models(kind: int | str, generation: str, take: Take) -> None:
    def settings(path: str, module: nn.Module) -> bool | dict[str, int]:
        eight = kind == "mixed" and path.endswith(("v_proj", "up_proj", "layers.1.mlp.down_proj"))
        size = module.weight.shape[-1] if hasattr(module, "to_quantized") else 1
        return size % 64 == 0 and {"group_size": 32, "bits": 8 if eight else 4}

    found = []
    for count in (1, 2):
        take(count)
        model = build(generation, prepared=False, text={"num_key_value_heads": 2, "intermediate_size": 192})
        if kind == "half":
            model.set_dtype(mx.bfloat16)
        else:
            nn.quantize(model.language_model, class_predicate=settings)
        model.prepare()
        assert {len(parts_of(mlp)) for _, mlp in layers(model)} == {count}
        cache = cache_maker(model, None)()
        first = model(model.embed(range(1, 20), [], []), cache)
        mx.eval(cache.arrays)
        decoding = Decoding(CompiledStep(model), cache)
        found.append([first, decoding(mx.array([[4]])), model.decode(mx.array([[5, 6]]), decoding.cache())])
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        if kind == "half":
            error = mx.abs((one - other).astype(mx.float32))
            assert error.mean() < 0.05 * mx.abs(one).mean()
        else:
            assert close(one, other)


def test_blocks_of_the_original_may_be_cut_differently(take: Take) -> None:
    found = []
    for cut in ((), (0,), (1,)):
        take(1)
        model = load("tiny_chat")
        take(2)
        blocks = model.language_model.model.h
        for index in cut:
            blocks[index].attn = over_cores.split(blocks[index].attn)
        assert [len(block.attentions) for block in blocks] == [1 + (index in cut) for index in (0, 1)]
        cache = model.make_cache()
        mx.eval(model(model.embed(range(1, 20), [], []), cache), cache.arrays)
        found.append(Decoding(CompiledStep(model), cache)(mx.array([[4]])))
    assert close(found[1], found[0])
    assert close(found[2], found[0])


def test_what_is_prepared_is_not_cut_any_more(take: Take) -> None:
    take(2)
    model = build("qwen2_vl", text={"num_key_value_heads": 1})
    before = model.logits(Prompt([1, 2, 3]))
    model.prepare()
    assert {len(parts_of(mixer)) for mixer, _ in layers(model)} == {1}
    assert close(model.logits(Prompt([1, 2, 3])), before)


def test_a_cache_of_other_layers_is_refused(take: Take) -> None:
    take(2)
    model, _ = made("qwen3_vl")
    take(1)
    other, _ = made("qwen3_vl")
    for mine, theirs in ((model, other), (other, model)):
        with pytest.raises(ValueError, match="does not fit"):
            mine.decode(mx.array([[3]]), theirs.make_cache())


@pytest.mark.parametrize("bits", [None, 4])
def test_parts_of_a_layer_add_up_to_it(bits: int | None, take: Take) -> None:
    mx.random.seed(0)
    mlp: Any = MLP(64, 192, bias=True)
    if bits:
        nn.quantize(mlp, group_size=32, bits=bits)
    x, residual = mx.random.normal((2, 5, 64)), mx.random.normal((2, 5, 64))
    whole = residual + mlp(x)
    cut = over_cores.split(mlp)
    assert len(parts_of(cut)) == 3
    for part in cut.modules():
        if part is not cut and hasattr(part, "prepare"):
            part.prepare()
    seen = []

    def update(part: nn.Module, core: int, residual: mx.array | None) -> mx.array:
        seen.append((core, str(here()), residual is None))
        return add_mlp(residual, part, x)

    np.testing.assert_allclose(over_cores.add_parts(residual, cut, update), whole, atol=1e-5)
    assert len({stream for _, stream, _ in seen}) == 3
    assert [(core, none) for core, _, none in seen] == [(0, False), (1, True), (2, True)]
    assert over_cores.split(cut) is cut
    np.testing.assert_allclose(residual + mlp(x), whole, atol=1e-6)  # left as it was


class Counting(nn.Linear):
    """A layer that does more than its weights say."""


def test_what_can_not_be_cut_is_left_whole(take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    odd, sealed, fine = MLP(64, 97), MLP(64, 96), MLP(64, 96)
    sealed.up_proj = Counting(64, 96, bias=False)
    assert [over_cores.split(one) is one for one in (odd, sealed, nn.Linear(96, 96), fine)] == [
        True,
        True,
        True,
        False,
    ]
    monkeypatch.setattr(over_cores, "WORTH", 1 << 22)
    assert over_cores.split(fine) is fine
    take(1)
    monkeypatch.setattr(over_cores, "WORTH", 1)
    assert over_cores.split(fine) is fine


def test_groups_of_quantised_weights_are_not_cut_through(take: Take) -> None:
    """Six groups go over three cores, four over two of them."""
    for inner, count in ((192, 3), (128, 2), (32, 1)):
        mlp = MLP(64, inner)
        nn.quantize(mlp, group_size=32, bits=4)
        assert len(parts_of(over_cores.split(mlp))) == count


def test_another_thread_has_streams_of_its_own(take: Take) -> None:
    x, found = mx.random.normal((30, 4)), []

    def work() -> None:
        found.append(np.array(by_rows(lambda rows: rows * 2, x, most=30)))
        mx.clear_streams()

    thread = threading.Thread(target=work)
    mx.eval(x, by_rows(lambda rows: rows * 2, x, most=30))
    thread.start()
    thread.join(timeout=60)
    np.testing.assert_array_equal(found[0], np.array(x) * 2)


@pytest.mark.parametrize("generation", [*GENERATIONS, "qwen_vl"])
def test_a_shared_model_stays_on_one_core(generation: str, take: Take) -> None:
    """Machines add in the order of their graphs, which must be the same on all of them."""
    config = json.loads(reference("qwen_vl/ckpt/tiny_chat/safetensors_fp32/config.json").read_text())
    model: Any = Model(config) if generation == "qwen_vl" else build(generation, prepared=False)
    assert cores.cores() == 3
    model.shard(mx.distributed.init())
    assert cores.cores() == 1
