"""Sampling has the reference's numbers and order, and every request draws for itself."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers import reference

from qwenvl_mlx.engine.options import GenerationOptions
from qwenvl_mlx.engine.sampling import Sampler, Warpers
from qwenvl_mlx.errors import GenerationError
from qwenvl_mlx.processor.base import GenerationDefaults

SILENT = GenerationDefaults()


@pytest.fixture(scope="module")
def goldens() -> dict[str, np.ndarray]:
    return dict(np.load(reference("qwen_vl/goldens/sampling.npz")))


def sampler(prompt: list[int] | None = None, vocab: int = 24, **options: object) -> Sampler:
    return Sampler(GenerationOptions(**options), SILENT, prompt or [], vocab)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "warpers"),
    [
        ("top_p0.3", Warpers(1.0, top_p=0.3)),
        ("top_p0.5", Warpers(1.0, top_p=0.5)),
        ("top_p0.9_temp0.7", Warpers(0.7, top_p=0.9)),
        ("top_k5", Warpers(1.0, top_k=5)),
        ("temp1.5_top_k5_top_p0.8", Warpers(1.5, top_k=5, top_p=0.8)),
        ("top_p0.01", Warpers(1.0, top_p=0.01)),
    ],
)
def test_distributions_are_those_of_transformers(
    goldens: dict[str, np.ndarray], name: str, warpers: Warpers
) -> None:
    for logits, wanted in zip(goldens["logits"], goldens[f"probs/{name}"], strict=True):
        ours = mx.softmax(warpers(mx.array(logits)))
        np.testing.assert_allclose(np.array(ours), wanted, atol=1e-6)


def test_repetition_penalty_counts_the_prompt(goldens: dict[str, np.ndarray]) -> None:
    wanted = goldens["logits_after_repetition_penalty_1.2"]
    for logits, ids, row in zip(goldens["logits"], goldens["rep_ids"], wanted, strict=True):
        ours = sampler(ids.tolist(), repetition_penalty=1.2).penalised(mx.array(logits))
        np.testing.assert_allclose(np.array(ours), row, atol=1e-6)


def test_repetition_penalty_counts_the_answer() -> None:
    choose = sampler(vocab=3, repetition_penalty=4.0)
    logits = mx.array([1.0, 2.0, 3.0])
    assert [choose(logits).item() for _ in range(3)] == [2, 1, 0]


def test_presence_and_frequency_count_the_answer_only() -> None:
    choose = sampler([2, 2, 2], vocab=3, presence_penalty=0.5, frequency_penalty=0.6)
    logits = mx.array([0.0, 2.0, 3.0])
    assert [choose(logits).item() for _ in range(5)] == [2, 1, 2, 2, 1]


def test_logit_bias_may_forbid_and_force() -> None:
    logits = mx.array([1.0, 2.0, 3.0])
    assert sampler(vocab=3, logit_bias={2: -100.0})(logits).item() == 1
    assert sampler(vocab=3, logit_bias={0: 100.0, 99: 5.0})(logits).item() == 0


def test_defaults_of_the_checkpoint_fill_what_the_caller_leaves_open() -> None:
    defaults = GenerationDefaults(temperature=0.6, top_p=0.9, top_k=20)
    assert Warpers.of(GenerationOptions(), defaults) == Warpers(0.6, 20, 0.9)
    assert Warpers.of(GenerationOptions(temperature=0.0), defaults).temperature == 0
    assert Warpers.of(GenerationOptions(top_k=-1), defaults).top_k == 0
    assert Warpers.of(GenerationOptions(), SILENT).temperature == 0


def test_temperature_0_is_the_likeliest_token_whatever_the_checkpoint_prefers() -> None:
    defaults = GenerationDefaults(temperature=0.1, repetition_penalty=9.0)
    logits = mx.array([3.0, 2.0])
    plain = Sampler(GenerationOptions(temperature=0.0), defaults, [0], 2)
    assert plain.plain
    assert plain(logits).item() == 0
    asked = Sampler(GenerationOptions(temperature=0.0, repetition_penalty=9.0), defaults, [0], 2)
    assert asked(logits).item() == 1
    assert Sampler(GenerationOptions(), defaults, [0], 2)(logits).item() == 1


def test_a_seed_repeats_and_leaves_the_global_generator_alone() -> None:
    logits = mx.zeros((1000,))
    mx.random.seed(1)
    expected = mx.random.uniform().item()
    mx.random.seed(1)
    first = [sampler(vocab=1000, temperature=1.0, seed=7)(logits).item() for _ in range(2)]
    assert mx.random.uniform().item() == expected
    assert first[0] == first[1]
    draws = sampler(vocab=1000, temperature=1.0, seed=7)
    assert len({draws(logits).item() for _ in range(20)}) > 10


def test_draws_follow_the_distribution() -> None:
    draw = sampler(vocab=3, temperature=1.0, seed=0)
    logits = mx.log(mx.array([0.2, 0.3, 0.5]))
    tokens = mx.stack([draw(logits) for _ in range(1500)])
    shares = np.bincount(np.array(tokens), minlength=3) / 1500
    np.testing.assert_allclose(shares, [0.2, 0.3, 0.5], atol=0.05)  # about 4 standard deviations


def test_min_p_keeps_what_comes_near_the_best() -> None:
    kept = Warpers(1.0, min_p=0.5)(mx.log(mx.array([0.5, 0.3, 0.2])))
    assert np.isfinite(np.array(kept)).tolist() == [True, True, False]


@pytest.mark.parametrize(
    "wrong",
    [
        {"stop": [1]},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"seed": "s"},
        {"seed": 10**30},
        {"top_p": float("nan")},
        {"temperature": "hot"},
        {"frequency_penalty": float("inf")},
        {"repetition_penalty": 0},
        {"logit_bias": {"a": 1}},
        {"logit_bias": {1: float("nan")}},
        {"ignore_eos": "yes"},
    ],
)
def test_what_would_fail_in_the_engine_is_refused_before(wrong: dict[str, Any]) -> None:
    with pytest.raises(GenerationError, match=next(iter(wrong))):
        GenerationOptions(**wrong)


def test_unusual_options_are_taken() -> None:
    options = GenerationOptions(seed=-1, logit_bias={"3": 100}, max_tokens=np.int64(4), temperature=1e-30)  # type: ignore[dict-item,arg-type]
    sampler = Sampler(options, GenerationDefaults(), [], 8)
    assert int(sampler(mx.zeros((8,)))) == 3
    assert sampler.greedy
