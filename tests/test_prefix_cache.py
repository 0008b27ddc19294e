"""What was read once is not read again, and an answer never depends on what was remembered."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest
from fakes import START, FakeModel, FakeProcessor, ask, picture

from qwenvl_mlx.engine import Engine, EngineOptions, GenerationOptions, Reply
from qwenvl_mlx.engine.prefix_cache import content_ids
from qwenvl_mlx.media import Prompt

NO_SPECIALS = dict.fromkeys((256, 257, 258), -100.0)
OPTIONS = GenerationOptions(max_tokens=12, ignore_eos=True, logprobs=5, logit_bias=NO_SPECIALS)
SMALL = EngineOptions(prefill_chunk=8, cache_bytes=10**8)


def engine_for(model: FakeModel, options: EngineOptions = SMALL) -> Engine:
    return Engine(model, FakeProcessor(), options)


@pytest.fixture(params=["attention", "hybrid"])
def model(request: pytest.FixtureRequest) -> FakeModel:
    return FakeModel(hybrid=request.param == "hybrid")


@pytest.fixture
def engine(model: FakeModel) -> Iterator[Engine]:
    with engine_for(model) as engine:
        yield engine


def cold(model: FakeModel, prompt: Prompt) -> Reply:
    with engine_for(model, EngineOptions(prefill_chunk=8, cache_bytes=0)) as engine:
        reply = engine.generate(prompt, OPTIONS)
        assert reply.usage.cached_tokens == 0
        return reply


def assert_same(warm: Reply, other: Reply) -> None:
    assert warm.tokens == other.tokens
    for a, b in zip(warm.logprobs, other.logprobs, strict=True):
        # float32; rows of other shapes give other rounding
        np.testing.assert_allclose([v for _, v in a.top], [v for _, v in b.top], atol=1e-4)


def test_a_second_question_about_a_picture_reuses_it(engine: Engine, model: FakeModel) -> None:
    engine.generate(ask("what is this?", picture(1)), OPTIONS)
    encoded = list(model.encoded)
    prompt = engine.prompt(ask("where is it?", picture(1)))
    warm = engine.generate(prompt, OPTIONS)
    assert warm.usage.cached_tokens >= 3 + 6  # role, start and the picture's tokens
    assert model.encoded == encoded
    assert_same(warm, cold(model, prompt))


def test_another_picture_of_the_same_size_is_another_prefix(engine: Engine, model: FakeModel) -> None:
    engine.generate(ask("what is this?", picture(1)), OPTIONS)
    prompt = engine.prompt(ask("what is this?", picture(2)))
    warm = engine.generate(prompt, OPTIONS)
    assert warm.usage.cached_tokens <= 3
    assert_same(warm, cold(model, prompt))


def test_the_next_turn_reuses_question_and_answer(engine: Engine, model: FakeModel) -> None:
    first = engine.prompt(ask("what?", picture(1)))
    answer = engine.generate(first, OPTIONS)
    ids = [*first.input_ids, *answer.tokens, *b" and then?"]
    prompt = Prompt(ids, first.media)
    warm = engine.generate(prompt, OPTIONS)
    assert warm.usage.cached_tokens == len(first) + len(answer.tokens) - 1  # the last token was never fed
    assert_same(warm, cold(model, prompt))


def test_asking_again_reuses_all_but_the_end(engine: Engine, model: FakeModel) -> None:
    prompt = engine.prompt(ask("what?", picture(1), picture(2)))
    first = engine.generate(prompt, OPTIONS)
    again = engine.generate(prompt, OPTIONS)
    assert again.usage.cached_tokens > 12
    assert_same(again, first)


def test_two_conversations_share_their_beginning(engine: Engine, model: FakeModel) -> None:
    system = [{"role": "system", "content": "a long text of instructions"}]
    for name in ("one", "two", "one more"):
        prompt = engine.prompt([*system, *ask(f"question {name}", picture(3))])
        assert_same(engine.generate(prompt, OPTIONS), cold(model, prompt))


def test_instructions_are_shared_whatever_the_cache(engine: Engine, model: FakeModel) -> None:
    turns = [[START, *text.encode()] for text in ("instructions", "first question", "a:")]
    engine.generate(Prompt([token for turn in turns for token in turn]), OPTIONS)
    turns[1] = [START, *b"another one"]
    prompt = Prompt([token for turn in turns for token in turn])
    warm = engine.generate(prompt, OPTIONS)
    assert warm.usage.cached_tokens >= len(turns[0])
    assert_same(warm, cold(model, prompt))


def test_features_outlive_their_kv_rows(model: FakeModel) -> None:
    prompt = FakeProcessor()(ask("what?", picture(1)))
    with engine_for(model) as engine:
        engine.generate(prompt, OPTIONS)
        engine.generate("x", OPTIONS)  # the loop has kept the first one when it takes this one
        engine._loop.prefixes.shrink(0)
        encoded = list(model.encoded)
        warm = engine.generate(prompt, OPTIONS)
    assert model.encoded == encoded
    assert warm.usage.cached_tokens <= 2
    assert_same(warm, cold(model, prompt))


def test_the_budget_is_kept_and_the_oldest_goes(model: FakeModel) -> None:
    with engine_for(model, EngineOptions(cache_bytes=200_000)) as engine:
        for seed in range(12):
            engine.generate(ask(f"question {seed}", picture(seed)), OPTIONS)
        prefixes = engine._loop.prefixes
        assert 0 < prefixes.nbytes <= 200_000
        recent = engine.generate(ask("question 11", picture(11)), OPTIONS)
        old = engine.generate(ask("question 0", picture(0)), OPTIONS)
    assert recent.usage.cached_tokens > old.usage.cached_tokens


def test_what_is_counted_is_what_is_kept(model: FakeModel) -> None:
    """Caches grow by 256 rows: a short prompt must not keep a long buffer."""
    options = GenerationOptions(max_tokens=5, ignore_eos=True)
    with engine_for(model, EngineOptions(cache_bytes=10**8)) as engine:
        engine.generate("the first", options)
        kept, counted = mx.get_active_memory(), engine.remembered_bytes
        for number in range(30):
            engine.generate(f"{number} question", options)
        kept, counted = mx.get_active_memory() - kept, engine.remembered_bytes - counted
    assert counted > 0
    assert kept < 1.2 * counted + 50_000


def test_rows_of_another_rope_key_are_not_shared(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeModel, "rope_key", lambda self, length: 1.0 if length < 20 else 3.0)
    with engine_for(model) as engine:
        engine.generate("short", OPTIONS)
        assert engine.generate("short" + " but then longer than twenty", OPTIONS).usage.cached_tokens == 0


def test_quantised_rows_are_shared_too(model: FakeModel) -> None:
    options = EngineOptions(prefill_chunk=8, kv_bits=8, cache_bytes=10**8)
    with engine_for(model, options) as engine:
        first = engine.generate(ask("what is this?", picture(1)), OPTIONS)
        again = engine.generate(ask("what is this?", picture(1)), OPTIONS)
    assert again.usage.cached_tokens > 0
    assert_same(again, first)
    plain = cold(model, FakeProcessor()(ask("what is this?", picture(1))))
    assert any(a.logprob != b.logprob for a, b in zip(first.logprobs, plain.logprobs, strict=True))


def test_content_ids_tell_pictures_apart_and_know_equal_ones() -> None:
    model, processor = FakeModel(), FakeProcessor()
    a, same, b = (content_ids(model, processor(ask("x", picture(seed)))) for seed in (1, 1, 2))
    assert (a == same).all()
    assert ((a != b) == (a < 0)).all()
    assert (a < 0).sum() == 6
    assert len(set(a[a < 0].tolist())) == 6
