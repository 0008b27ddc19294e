"""Guessed tokens make answers faster, never different."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from fakes import FakeModel, FakeProcessor, ask, picture

from qwenvl_mlx.engine import Engine, EngineOptions, GenerationOptions, Reply
from qwenvl_mlx.engine.batch import Batch
from qwenvl_mlx.engine.lookup import PATIENCE, REST, Lookup
from qwenvl_mlx.media import Prompt
from qwenvl_mlx.processor.base import GenerationDefaults


class Parrot(FakeModel):
    """Mostly goes on as the text went on before: after token t comes the one that followed t in the alphabet's circle,
    but every now and then the network below decides."""

    def __init__(self, stubborn: float) -> None:
        super().__init__()
        self._stubborn = stubborn

    def decode(self, tokens: mx.array, cache: Any) -> mx.array:
        logits = super().decode(tokens, cache)
        follower = 97 + (tokens - 97 + 1) % 26
        return logits + self._stubborn * (mx.arange(logits.shape[-1]) == follower[..., None])


def answer(model: FakeModel, prompt: Prompt, *, lookup: bool, **options: Any) -> Reply:
    values = {"max_tokens": 60, "ignore_eos": True, **options}
    engine_options = EngineOptions(prompt_lookup=lookup, cache_bytes=10**8, prefill_chunk=16)
    with Engine(
        model, FakeProcessor(GenerationDefaults(eos_token_ids=frozenset({106}))), engine_options
    ) as engine:
        reply = engine.generate(prompt, GenerationOptions(**values))
        # The state that is kept afterwards must be the right one as well.
        longer = Prompt([*prompt.input_ids, *reply.tokens, 65], prompt.media)
        following = engine.generate(longer, GenerationOptions(max_tokens=5, ignore_eos=True))
        assert following.usage.cached_tokens >= len(prompt) + len(reply.tokens) - 1
    with Engine(model, FakeProcessor(), EngineOptions(prompt_lookup=False, cache_bytes=0)) as engine:
        cold = engine.generate(longer, GenerationOptions(max_tokens=5, ignore_eos=True))
    assert following.tokens == cold.tokens
    return reply


@pytest.mark.parametrize("stubborn", [0.0, 4.0, 8.0, 30.0])
@pytest.mark.parametrize("options", [{}, {"ignore_eos": False}, {"stop": ("uvw",)}, {"max_tokens": 7}])
def test_the_answer_is_the_same(stubborn: float, options: dict[str, Any]) -> None:
    model = Parrot(stubborn)
    prompt = FakeProcessor()(ask("abcdefghijklmnopqrstuvwxyzabcdefgh", picture(1)))
    plain = answer(model, prompt, lookup=False, **options)
    guessed = answer(model, prompt, lookup=True, **options)
    assert guessed.tokens == plain.tokens
    assert guessed.text == plain.text
    assert guessed.finish_reason == plain.finish_reason


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each step of the batch was given."""
    counts: list[int] = []
    plain = Batch._decode

    def counting(self: Batch, tokens: mx.array) -> mx.array:
        counts.append(tokens.shape[1])
        return plain(self, tokens)

    monkeypatch.setattr(Batch, "_decode", counting)
    return counts


def test_repetition_takes_fewer_steps(steps: list[int]) -> None:
    prompt = FakeProcessor()(ask("abcdefghijklmnopqrstuvwxyzabcdefgh"))
    with Engine(Parrot(30.0), FakeProcessor()) as engine:
        engine.generate(prompt, GenerationOptions(max_tokens=100, ignore_eos=True))
    assert len(steps) < 40


def test_sampled_answers_are_not_guessed(steps: list[int]) -> None:
    with Engine(Parrot(30.0), FakeProcessor()) as engine:
        options = GenerationOptions(max_tokens=30, ignore_eos=True, temperature=0.5, seed=1)
        engine.generate("abcdefghijklmnopqrstuvwxyzabcdefgh", options)
    assert steps == [1] * 29  # one for each token but the last


def test_a_guess_is_what_followed_the_last_occurrence() -> None:
    lookup = Lookup([1, 2, 3, 4, 5, 1, 2, 3, 9, 8, 7, 6, 1, 2, 3])
    assert lookup.guess() == [9, 8, 7, 6]
    lookup.extend([4])
    assert lookup.guess() == [5, 1, 2, 3]  # 1 2 3 4 stood before


def test_guesses_that_fail_become_rare() -> None:
    lookup = Lookup([1, 2, 3, 9, 8, 7, 1, 2, 3])
    for _ in range(PATIENCE):
        assert lookup.guess()
        lookup.judge(right=0, guessed=4)
    assert lookup.guess() == []
    lookup.extend([5] * REST + [1, 2, 3])
    assert lookup.guess()
