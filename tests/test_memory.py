"""What does not fit is refused or made smaller before work starts, and requests wait for memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from fakes import FakeModel, FakeProcessor, ask, hold, picture

from qwenvl_mlx.engine import Engine, EngineOptions, GenerationOptions, memory
from qwenvl_mlx.engine.kv import cache_maker, kv_cost
from qwenvl_mlx.engine.memory import MemoryPlan, picture_size, working_set
from qwenvl_mlx.errors import GenerationError, OutOfMemory
from qwenvl_mlx.media import Media, Prompt
from qwenvl_mlx.models import model_class
from qwenvl_mlx.processor.base import MediaOptions, Message
from qwenvl_mlx.sizes import SIZES

ROW = 2 * 2 * 64 * 4  # bytes a token: two layers, keys and values, width, float32


def allow(monkeypatch: pytest.MonkeyPatch, model: FakeModel, free: int) -> None:
    """Let the machine have so much beside the model."""
    weights = MemoryPlan(model, None, 0).weights
    monkeypatch.setattr(memory, "working_set", lambda: weights + free)


def test_cost_of_a_token_is_that_of_the_cache() -> None:
    assert kv_cost(FakeModel(), None).token == ROW
    assert kv_cost(FakeModel(), 8).token == pytest.approx(ROW * (8 + 64 / 64) / 32)
    hybrid = kv_cost(FakeModel(hybrid=True), None)
    assert (hybrid.token, hybrid.fixed) == (ROW, 64 * 4)


def test_kv_bits_that_do_not_fit_the_heads_are_refused() -> None:
    with pytest.raises(GenerationError, match="kv_bits"):
        cache_maker(FakeModel(width=48), 8)


def test_a_prompt_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeModel()
    allow(monkeypatch, model, 100 * ROW)
    options = GenerationOptions(max_tokens=10, ignore_eos=True)
    with Engine(model, FakeProcessor()) as engine:
        assert engine.generate("x" * 60, options).finish_reason == "length"
        with pytest.raises(OutOfMemory, match="max_pixels"):
            engine.submit("x" * 200, options)


class Resizing(FakeProcessor):
    """Pictures have as many patches of four pixels as ``max_pixels`` allows, 150 at most."""

    def __call__(
        self, messages: Sequence[Message], *, options: MediaOptions | None = None, **more: Any
    ) -> Prompt:
        limit = options.max_pixels if options and options.max_pixels else 600
        self.limits = [*getattr(self, "limits", []), options.max_pixels if options else None]
        return super().__call__(ask("what?", picture(1, min(limit // 4, 150))), options=options)


def test_pictures_are_reduced_to_what_fits_unless_their_size_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, processor = FakeModel(), Resizing()
    allow(monkeypatch, model, 100 * ROW)
    monkeypatch.setattr("qwenvl_mlx.engine.engine.EXPECTED_ANSWER", 10)
    options = GenerationOptions(max_tokens=10, ignore_eos=True)
    with Engine(model, processor) as engine:
        reply = engine.generate(ask("what?"), options)
        assert reply.usage.prompt_tokens <= 90
        assert reply.picture_sizes == [(2 * (reply.usage.prompt_tokens - 11), 2)]
        with pytest.raises(OutOfMemory):
            engine.submit(ask("what?"), options, media=MediaOptions(max_pixels=600))


def test_requests_wait_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeModel()
    allow(monkeypatch, model, 250 * ROW)
    options = GenerationOptions(max_tokens=50, ignore_eos=True)
    most = 0
    plain = FakeModel.decode

    def counting(self: FakeModel, tokens: Any, cache: Any) -> Any:
        nonlocal most
        most = max(most, tokens.shape[0])
        return plain(self, tokens, cache)

    monkeypatch.setattr(FakeModel, "decode", counting)
    with Engine(model, FakeProcessor()) as engine:
        requests = [engine.submit("x" * 50 + str(number), options) for number in range(5)]
        assert all(len(request.result().tokens) == 50 for request in requests)
    assert most == 2  # 2 x (58 + 50) rows fit, three don't


def test_padding_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long answer's neighbours must not be padded to its length where the memory does not allow it."""
    model = FakeModel()
    together: list[int] = []
    allow(monkeypatch, model, 700 * ROW)
    plain = FakeModel.decode

    def watching(self: FakeModel, tokens: Any, cache: Any, **options: Any) -> Any:
        together.append(tokens.shape[0])
        return plain(self, tokens, cache, **options)

    monkeypatch.setattr(FakeModel, "decode", watching)
    options = GenerationOptions(max_tokens=30, ignore_eos=True)
    with Engine(model, FakeProcessor(), EngineOptions(cache_bytes=0, prompt_lookup=False)) as engine:
        requests = [engine.submit("x" * length, options) for length in (400, 10, 11, 12)]
        assert [len(request.result().tokens) for request in requests] == [30] * 4
    assert max(together) == 3  # the short ones; the long one by itself
    padded = MemoryPlan(model, None, 10**9)
    assert padded.allows_padding(10, 0)
    assert not padded.allows_padding(10**9 // ROW, 0)


def test_prompts_read_as_one_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four that wait, where two find room, each with 10 tokens and its answer; and copies of 20."""
    model, rows = FakeModel(), []
    allow(monkeypatch, model, 310 * ROW)
    plain = FakeModel.decode

    def watching(self: FakeModel, tokens: Any, cache: Any, **options: Any) -> Any:
        rows.extend([len(tokens)] * options.get("last_only", False))
        return plain(self, tokens, cache, **options)

    monkeypatch.setattr(FakeModel, "decode", watching)
    options = GenerationOptions(max_tokens=100, ignore_eos=True)
    with Engine(model, FakeProcessor(), EngineOptions(cache_bytes=0, prompt_lookup=False)) as engine:
        held = hold(engine)
        requests = [engine.submit(Prompt([number] * 10), options) for number in range(4)]
        held.set()
        assert [len(request.result().tokens) for request in requests] == [100] * 4
    assert rows == [2, 2]


def test_what_is_remembered_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeModel()
    allow(monkeypatch, model, 200 * ROW)
    with Engine(model, FakeProcessor(), EngineOptions(cache_bytes=10**9)) as engine:
        for number in range(6):
            engine.generate(str(number) * 100, GenerationOptions(max_tokens=50, ignore_eos=True))
            assert engine._loop.prefixes.nbytes <= 400 * ROW


def test_weights_and_activations_of_true_shapes() -> None:
    config = SIZES["Qwen2.5-VL-7B"]
    plan = MemoryPlan(model_class(config)(config), None, 10**12)
    small, large = (_picture(side) for side in (32, 128))
    needs = [plan.needs(prompt, 0) for prompt in (small, large)]
    assert needs[0] < 5e8
    assert needs[1] == pytest.approx(
        16 * needs[0], rel=0.01
    )  # scores of attention never stand in memory whole
    assert plan.share(large, 0) == 1
    tight = MemoryPlan(model_class(config)(config), None, plan.weights + needs[1] // 2)
    assert 0.3 < tight.share(large, 0) < 0.8
    with pytest.raises(OutOfMemory):
        tight.check(large, 0)
    tight.check(small, 0)


def _picture(side: int) -> Prompt:
    item = Media("image", np.zeros((side * side, 3 * 2 * 14 * 14), np.uint8), (1, side, side))
    return Prompt([151655] * (side * side // 4), [item])


def test_sizes_of_pictures() -> None:
    rows = np.zeros((6, 3 * 14 * 14), np.uint8)
    assert picture_size(Media("image", rows, (1, 2, 3))) == (42, 28)
    assert picture_size(Media("image", np.zeros((6, 3 * 2 * 16 * 16), np.uint8), (1, 2, 3))) == (48, 32)
    assert picture_size(Media("image", np.zeros((3, 448, 448), np.uint8), (1, 32, 32))) == (448, 448)


def test_the_machine_has_memory() -> None:
    assert working_set() > 10**8


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries do this by themselves")
def test_the_heaps_holes_are_given_back() -> None:
    """In a process of its own: what the tests before left in the heap would hide it."""
    program = """
import os, psutil
from qwenvl_mlx.engine.memory import give_back
rss = lambda: psutil.Process().memory_info().rss
blocks = [bytes(60_000) for _ in range(2000)]
kept = blocks[::50]  # what lives on between the holes
del blocks
before = rss()
give_back()
print(before - rss())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 80e6
