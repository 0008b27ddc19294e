"""Requests come and go at any step, and none changes another's answer."""

from __future__ import annotations

import io
import random
import threading
import time
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from fakes import FakeModel, FakeProcessor, ask, hold, picture

from qwenvl_mlx.engine import Engine, EngineOptions, GenerationOptions, Reply, Request, TextEvent
from qwenvl_mlx.engine.batch import Batch
from qwenvl_mlx.errors import GenerationError, MediaError, PromptError
from qwenvl_mlx.layers.cache import Cache
from qwenvl_mlx.media import Embedded, Prompt

NO_SPECIALS = dict.fromkeys((256, 257, 258), -100.0)


@pytest.fixture(params=["attention", "hybrid"])
def model(request: pytest.FixtureRequest) -> FakeModel:
    return FakeModel(hybrid=request.param == "hybrid")


def engine_for(model: FakeModel, **options: object) -> Engine:
    values = {"prefill_chunk": 8, "cache_bytes": 0, **options}
    return Engine(model, FakeProcessor(), EngineOptions(**values))  # type: ignore[arg-type]


def mixed(count: int, seed: int = 0) -> list[tuple[Prompt, GenerationOptions]]:
    """Prompts of all lengths, with and without pictures; greedy, sampled and penalised."""
    chance, processor = random.Random(seed), FakeProcessor()
    work = []
    for number in range(count):
        pictures = [picture(number, chance.randint(1, 9)) for _ in range(chance.randint(0, 2))]
        prompt = processor(ask(f"question {number} " * chance.randint(1, 4), *pictures))
        options = {
            "max_tokens": chance.randint(1, 25),
            "temperature": chance.choice([0.0, 0.0, 0.9]),
            "top_p": chance.choice([None, 0.8]),
            "repetition_penalty": chance.choice([None, 1.3]),
            "seed": number,
            "ignore_eos": True,
            "logit_bias": chance.choice([{}, NO_SPECIALS]),
            "logprobs": chance.choice([None, 3]),
        }
        work.append((prompt, GenerationOptions(**options)))
    return work


def alone(model: FakeModel, work: list[tuple[Prompt, GenerationOptions]]) -> list[Reply]:
    with engine_for(model, max_batch=1) as engine:
        return [engine.generate(prompt, options) for prompt, options in work]


@pytest.mark.parametrize("cache_bytes", [0, 10**8])
@pytest.mark.parametrize("kv_bits", [None, 8])
def test_neighbours_change_nothing(model: FakeModel, cache_bytes: int, kv_bits: int | None) -> None:
    work = mixed(20)
    with engine_for(model, max_batch=1, kv_bits=kv_bits) as engine:
        wanted = [engine.generate(prompt, options) for prompt, options in work]
    with engine_for(model, max_batch=6, cache_bytes=cache_bytes, kv_bits=kv_bits) as engine:
        requests = [engine.submit(prompt, options) for prompt, options in work]
        replies = [request.result() for request in requests]
    for reply, single in zip(replies, wanted, strict=True):
        assert reply.tokens == single.tokens
        assert reply.text == single.text
        assert reply.finish_reason == single.finish_reason
        np.testing.assert_allclose(
            [entry.logprob for entry in reply.logprobs],
            [entry.logprob for entry in single.logprobs],
            atol=1e-4,  # float32: products of other batch sizes round differently
        )


def test_they_are_decoded_together(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    plain = FakeModel.decode

    def counting(self: FakeModel, tokens: object, cache: object) -> object:
        rows.append(tokens.shape[0])  # type: ignore[attr-defined]
        return plain(self, tokens, cache)  # type: ignore[arg-type]

    monkeypatch.setattr(FakeModel, "decode", counting)
    options = GenerationOptions(max_tokens=40, ignore_eos=True)
    with engine_for(model) as engine:
        requests = [engine.submit(f"question {number}", options) for number in range(4)]
        for request in requests:
            request.result()
    assert max(rows) == 4
    assert len(rows) < 100  # one by one it would be 160


@pytest.fixture
def joint(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Rows and tokens of every reading of several prompts."""
    shapes: list[tuple[int, ...]] = []
    plain = FakeModel.decode

    def watching(self: FakeModel, tokens: mx.array, cache: Cache, *, last_only: bool = False) -> mx.array:
        shapes.extend([tokens.shape] * last_only)
        return plain(self, tokens, cache, last_only=last_only)

    monkeypatch.setattr(FakeModel, "decode", watching)
    return shapes


def at_once(engine: Engine, work: Sequence[tuple[Prompt, GenerationOptions]]) -> list[Request]:
    """Submit while the engine's thread is held, so that all wait together."""
    held = hold(engine)
    requests = [engine.submit(prompt, options) for prompt, options in work]
    held.set()
    return requests


@pytest.mark.parametrize("cache_bytes", [0, 10**8])
def test_short_prompts_that_wait_are_read_as_one(
    model: FakeModel, cache_bytes: int, joint: list[tuple[int, ...]]
) -> None:
    """Of different lengths, sampled and greedy; the one with a picture is read alone."""
    texts = [f"{number} " * (3 + number) for number in range(6)]
    options = GenerationOptions(max_tokens=9, temperature=0.9, seed=3, ignore_eos=True)
    work = [(FakeProcessor()(ask(text)), options) for text in texts]
    work += [(FakeProcessor()(ask("", picture())), options), *work[:1]]
    wanted = alone(model, work)
    with engine_for(model, prefill_chunk=512, cache_bytes=cache_bytes) as engine:
        replies = [request.result() for request in at_once(engine, work)]
    assert [reply.tokens for reply in replies] == [reply.tokens for reply in wanted]
    known = len("u:") if cache_bytes else 0  # from the prompt that held the thread
    # a recurrent state takes no padding
    assert joint == ([] if model._hybrid else [(6, len(work[5][0]) - known)])


def test_what_others_know_is_not_read_again(joint: list[tuple[int, ...]]) -> None:
    """Prompts of one beginning: the first is read alone, then the rest of the others as one."""
    model, beginning = FakeModel(), "the same instructions for all of you: "
    options = GenerationOptions(max_tokens=1)  # while others answer, slices are small
    ends = ["1?", "what is b?", "and what is, if I may ask, the meaning of c?", "d"]
    work = [(FakeProcessor()(ask(beginning + end)), options) for end in ends]
    wanted = alone(model, work)
    with engine_for(model, prefill_chunk=512, cache_bytes=10**8) as engine:
        replies = [request.result() for request in at_once(engine, work)]
    assert [reply.tokens for reply in replies] == [reply.tokens for reply in wanted]
    longest = len(work[2][0]) - len(beginning) - len("u:")
    assert joint == [(3, longest)]
    used = [reply.usage.cached_tokens for reply in replies]
    assert used == [len("u:"), *(max(len(prompt) - longest, 0) for prompt, _ in work[1:])]


def test_prompts_read_as_one_fail_and_are_cancelled_alone(joint: list[tuple[int, ...]]) -> None:
    model, options = FakeModel(), GenerationOptions(max_tokens=5, ignore_eos=True)
    work = [(Prompt([number, *range(40, 60)]), options) for number in (1, 2, 3, 4, 999, 5, 6)]
    wanted = alone(model, [*work[:4], *work[5:]])
    with engine_for(model, prefill_chunk=512) as engine:
        held = hold(engine)
        requests = [engine.submit(prompt, options) for prompt, options in work]
        requests[1].cancel()
        held.set()
        with pytest.raises(PromptError, match="999 is no token"):
            requests[4].result()
        assert requests[1].result().finish_reason == "cancelled"
        good = [requests[i].result().tokens for i in (0, 2, 3, 5, 6)]
    assert good == [wanted[i].tokens for i in (0, 2, 3, 4, 5)]
    assert not joint  # with such a prompt among them, they are read one by one


def test_what_can_not_be_read_as_one_is_read_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order; and those who come later are read as one again."""
    model, plain, plain_call = FakeModel(), FakeModel.decode, FakeModel.__call__
    options = GenerationOptions(max_tokens=5, ignore_eos=True)
    work = [(Prompt([number] * (9 + number)), options) for number in (1, 2, 3)]
    wanted = alone(model, work)
    joint: list[int] = []
    single: list[int] = []

    def full(self: FakeModel, tokens: mx.array, cache: Cache, *, last_only: bool = False) -> mx.array:
        joint.extend([len(tokens)] * last_only)
        if last_only and len(joint) == 1:
            raise MemoryError("full")
        return plain(self, tokens, cache, last_only=last_only)

    def reading(self: FakeModel, embedded: Embedded, *args: Any, **more: Any) -> mx.array:
        single.append(len(embedded))
        return plain_call(self, embedded, *args, **more)

    monkeypatch.setattr(FakeModel, "decode", full)
    monkeypatch.setattr(FakeModel, "__call__", reading)
    with engine_for(model, prefill_chunk=512) as engine:
        for _ in range(2):
            replies = [request.result() for request in at_once(engine, work)]
            assert [reply.tokens for reply in replies] == [reply.tokens for reply in wanted]
    assert joint == [3, 3]
    held = len(FakeProcessor()(ask("hold")))
    assert single == [held, 10, 11, 12, held]


def test_no_more_are_read_as_one_than_may_run(joint: list[tuple[int, ...]]) -> None:
    options = GenerationOptions(max_tokens=3, ignore_eos=True)
    with engine_for(FakeModel(), prefill_chunk=512, max_batch=3) as engine:
        for request in at_once(engine, [(Prompt([number] * 9), options) for number in range(5)]):
            assert len(request.result().tokens) == 3
    assert joint == [(3, 9), (2, 9)]


def test_the_thread_dies_on_prompts_that_were_read_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each hears of it once, also those that were about to join."""

    def broken(*_: object) -> None:
        raise TypeError("broken")

    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    with engine_for(FakeModel(), prefill_chunk=512) as engine:
        held = hold(engine)
        monkeypatch.setattr("qwenvl_mlx.engine.loop.Sampler", broken)
        requests = [engine.submit(Prompt([number, 9]), GenerationOptions()) for number in (1, 2, 3)]
        held.set()
        for request in requests:
            with pytest.raises(GenerationError, match="broken"):
                request.result()


def test_no_graph_grows_with_the_answers(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts that nobody computes would be sums of as many terms as tokens were made: memory that never returns."""
    sizes: list[int] = []
    plain = FakeModel.decode

    def measuring(self: FakeModel, tokens: mx.array, cache: Cache) -> mx.array:
        if cache.rows > 1:  # the last one goes on alone, in compiled steps
            sizes.append(max(graph_size(array) for array in [cache.rope_delta, *cache.arrays]))
        return plain(self, tokens, cache)

    monkeypatch.setattr(FakeModel, "decode", measuring)
    options = GenerationOptions(max_tokens=60, ignore_eos=True)
    with engine_for(model) as engine:
        requests = [engine.submit(f"question {number}", options) for number in range(3)]
        for request in requests:
            request.result()
    assert max(sizes[40:50]) <= max(sizes[20:30])


def graph_size(array: mx.array) -> int:
    """Edges of what is still to be computed."""
    drawing = io.StringIO()
    mx.export_to_dot(drawing, array)
    return drawing.getvalue().count("->")


def test_running_answers_go_on_while_a_long_prompt_is_read(model: FakeModel) -> None:
    options = GenerationOptions(max_tokens=400, ignore_eos=True, logprobs=0)
    with engine_for(model) as engine:
        running = engine.submit("go", options)
        events = iter(running)
        next(events)
        long = engine.submit("x" * 400, GenerationOptions(max_tokens=1))  # 50 slices
        done = threading.Event()
        threading.Thread(target=lambda: (long.result(), done.set())).start()
        pieces = 0
        while not done.is_set():
            pieces += isinstance(next(events), TextEvent)
        running.cancel()
    assert pieces >= 20  # bytes that are no characters are held back now and then


def test_running_answers_go_on_while_a_large_picture_is_encoded(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.pauses = 60
    monkeypatch.setattr("qwenvl_mlx.engine.pace.MOST_PATCHES", 9)
    with engine_for(model) as engine:
        running = engine.submit("go", GenerationOptions(max_tokens=400, ignore_eos=True, logprobs=0))
        events = iter(running)
        next(events)
        large = engine.submit(ask("x", picture(1, 9)), GenerationOptions(max_tokens=1))
        done = threading.Event()
        threading.Thread(target=lambda: (large.result(), done.set())).start()
        pieces = 0
        while not done.is_set():
            pieces += isinstance(next(events), TextEvent)
        running.cancel()
    assert pieces >= 20


def test_cancelled_and_failed_requests_leave_the_others_alone(model: FakeModel) -> None:
    work = mixed(12, seed=3)
    wanted = alone(model, work)
    with engine_for(model, max_batch=4) as engine:
        requests: list[Request] = []
        for prompt, options in work:
            requests.append(engine.submit(prompt, options))
            engine.submit("cancelled at once", GenerationOptions(max_tokens=100)).cancel()
            bad = engine.submit(ask("a video?", picture(kind="video")), options)
        for request, single in zip(requests, wanted, strict=True):
            assert request.result().tokens == single.tokens
        with pytest.raises(MediaError):
            bad.result()


def test_a_cancelled_answer_frees_its_place_before_the_next_step(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that is on its way when the word comes ends; no other begins, and no other slice of a prompt."""
    steps: list[int] = []
    plain = Batch._decode

    def counting(self: Batch, tokens: mx.array) -> mx.array:
        steps.append(len(tokens))
        return plain(self, tokens)

    monkeypatch.setattr(Batch, "_decode", counting)
    after: list[int] = []

    def listen(event: object) -> None:
        if isinstance(event, TextEvent) and len(steps) > 5 and not after:
            request.cancel()
            after.append(len(steps))

    with engine_for(model) as engine:
        options = GenerationOptions(max_tokens=400, ignore_eos=True, logprobs=0)
        request = engine.submit("go", options, listener=listen)
        while not after or engine.running:
            time.sleep(0.001)
        assert len(steps) == after[0]


def test_a_cancelled_prompt_is_read_no_further(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    slices: list[int] = []
    plain = FakeModel.__call__

    def reading(self: FakeModel, embedded: Embedded, *args: object, **options: object) -> mx.array:
        slices.append(len(embedded))
        if len(slices) == 3:
            request.cancel()
        return plain(self, embedded, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(FakeModel, "__call__", reading)
    with engine_for(model) as engine:
        request = engine.submit("x" * 400, GenerationOptions(max_tokens=9))  # 50 slices
        assert request.result().finish_reason == "cancelled"
        assert not engine.running
    assert len(slices) == 3


def test_many_threads_may_ask_at_once(model: FakeModel) -> None:
    work = mixed(16, seed=5)
    wanted = alone(model, work)
    replies: dict[int, list[int]] = {}
    with engine_for(model, max_batch=5) as engine:

        def ask_one(number: int) -> None:
            replies[number] = engine.generate(*work[number]).tokens

        threads = [threading.Thread(target=ask_one, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [replies[number] for number in range(16)] == [reply.tokens for reply in wanted]
