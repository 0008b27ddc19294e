"""Slices are as large as a moment allows while somebody waits, and as large as possible else."""

from __future__ import annotations

import time
from itertools import pairwise

import mlx.core as mx
import pytest
from fakes import FakeModel, FakeProcessor, ask, picture

from qwenvl_mlx.engine import Engine, EngineOptions, GenerationOptions
from qwenvl_mlx.engine.batch import Batch
from qwenvl_mlx.engine.pace import LEAST_TOKENS, STALL, Pace, Paces
from qwenvl_mlx.layers.cache import Cache
from qwenvl_mlx.layers.stages import Stages
from qwenvl_mlx.media import Embedded, Features, Media


def test_a_slice_takes_what_fits_the_moment() -> None:
    pace = Pace(32, 512)
    assert pace.slice(hurried=False) == 512
    assert pace.slice(hurried=True) == 32  # nothing is known yet
    pace.learn(100, STALL / 2)
    assert pace.slice(hurried=True) == 200
    pace.learn(7, STALL)  # a remainder says nothing
    assert pace.slice(hurried=True) == 200
    pace.learn(100, STALL / 100)
    assert pace.slice(hurried=True) == 512
    pace.learn(100, 100 * STALL)
    assert pace.slice(hurried=True) == 32


def test_small_limits_are_kept() -> None:
    assert Paces(lambda: True, 8).next_tokens(11) == 6
    paces = Paces(lambda: True, 512)
    assert paces.next_tokens(512) == LEAST_TOKENS
    assert paces.next_tokens(LEAST_TOKENS + 9) == LEAST_TOKENS + 9  # no scraps
    assert (
        paces.next_tokens(2 * LEAST_TOKENS - 9) == LEAST_TOKENS - 4
    )  # two, rather than one of twice the size
    assert Paces(lambda: False, 512).next_tokens(700) == 350
    assert Paces(lambda: True, 512).next_tokens(1) == 1
    assert Paces(lambda: True, 512).next_blocks(10**6) == 1


class Slow(FakeModel):
    """A millisecond for each token of a prompt and each patch of a stage; keeps a diary of what it did."""

    def __init__(self) -> None:
        super().__init__(context=4096)
        self.diary: list[tuple[str, int]] = []

    def __call__(
        self, embedded: Embedded, cache: Cache | None = None, *, last_only: bool = False
    ) -> mx.array:
        self.diary.append(("read", len(embedded)))
        time.sleep(len(embedded) / 1000)
        return super().__call__(embedded, cache, last_only=last_only)

    def encode_stages(self, media: Media) -> Stages[Features]:
        for _ in range(20):
            self.diary.append(("look", media.grid[2]))
            time.sleep(media.grid[2] / 1000)
            yield mx.zeros((1,))
        return self.encode([media])[0]

    def longest_pause(self) -> float:
        """Seconds of reading and looking between two steps, from the first step to the last."""
        steps = [index for index, (what, _) in enumerate(self.diary) if what == "decode"]
        pauses = [sum(cost for _, cost in self.diary[a:b]) for a, b in pairwise(steps)]
        return max(pauses) / 1000


@pytest.mark.parametrize("question", ["x" * 1500, ask("x", picture(1, 100))], ids=["text", "picture"])
def test_running_answers_wait_a_moment_only(question: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwenvl_mlx.engine.pace.LEAST_PATCHES", 10)
    model, plain = Slow(), Batch._decode

    def noted(batch: Batch, tokens: mx.array) -> mx.array:
        model.diary.append(("decode", 0))
        return plain(batch, tokens)

    monkeypatch.setattr(Batch, "_decode", noted)
    with Engine(model, FakeProcessor(), EngineOptions(prefill_chunk=1024, cache_bytes=0)) as engine:
        running = engine.submit("y" * 60, GenerationOptions(max_tokens=4000, ignore_eos=True, logprobs=0))
        engine.generate(question, GenerationOptions(max_tokens=1))  # type: ignore[arg-type]
        running.cancel()
        running.result()
        assert 0 < model.longest_pause() <= 1.5 * STALL  # at once it would be 1.0 and 2.0 seconds
        engine.generate("z" * (2048 - len("u:a:.")), GenerationOptions(max_tokens=1))
    assert ("read", 1024) in model.diary  # alone, nobody waits
