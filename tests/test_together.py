"""Which prompts are read as one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from fakes import FakeModel, FakeProcessor, picture

from qwenvl_mlx.engine.kv import cache_maker
from qwenvl_mlx.engine.memory import COPIES, SMALL_PADDING, MemoryPlan
from qwenvl_mlx.engine.options import GenerationOptions
from qwenvl_mlx.engine.pace import LEAST_TOKENS, STALL, Paces
from qwenvl_mlx.engine.prefill import Prefill
from qwenvl_mlx.engine.prefix_cache import PrefixCache
from qwenvl_mlx.engine.request import Request
from qwenvl_mlx.engine.sequence import Sequence
from qwenvl_mlx.engine.together import Together
from qwenvl_mlx.media import Media, Prompt


class Desk:
    """What makes prompts and says which are read as one; a slice has 100 tokens at most."""

    def __init__(self, model: FakeModel, *, hurried: bool = False, limit: int | None = None) -> None:
        self.model, self.memory = model, PrefixCache(10**8)
        self.paces = Paces(lambda: hurried, 100)
        self.plan = MemoryPlan(model, None, limit)
        self.together = Together(model, self.paces, self.plan, remembers=True)

    def prefill(self, ids: list[int], *media: Media, kv_bits: int | None = None) -> Prefill:
        sequence = Sequence(Request(Prompt(ids, list(media)), GenerationOptions()), FakeProcessor(), 9)
        new_cache = cache_maker(self.model, kv_bits)
        return Prefill(self.model, new_cache, self.memory, sequence, paces=self.paces)

    def text(self, length: int, first: int = 0) -> Prefill:
        """A prompt that begins like no other, unless ``first`` is the same."""
        return self.prefill([first, *range(1, length)])


def test_only_text_in_caches_that_can_be_joined_and_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(FakeModel())
    assert desk.together.suits(desk.text(5))
    assert not desk.together.suits(desk.prefill([257, 256, 256], picture(0, 2)))
    assert not desk.together.suits(desk.prefill([1, 2, 3], kv_bits=8))
    hybrid = Desk(FakeModel(hybrid=True))
    assert not hybrid.together.suits(hybrid.text(5))
    desk.model.sharded = True
    assert not desk.together.suits(desk.text(5))
    desk.model.sharded = False
    monkeypatch.setattr(FakeModel, "rope_key", lambda self, length: 2.0)
    assert not desk.together.suits(desk.text(5))


@pytest.mark.parametrize(
    ("others", "length", "fits"), [([50], 50, True), ([50], 51, False), ([51], 2, False)]
)
def test_all_fit_a_slice_with_their_padding(others: list[int], length: int, fits: bool) -> None:
    desk = Desk(FakeModel())
    group = [desk.text(other, first=7 + index) for index, other in enumerate(others)]
    assert desk.together.gains(group, desk.text(length), 0) is fits


def test_slices_are_smaller_while_others_answer() -> None:
    desk = Desk(FakeModel(), hurried=True)
    assert desk.together.gains([desk.text(LEAST_TOKENS // 2, 1)], desk.text(LEAST_TOKENS // 2), 0)
    assert not desk.together.gains([desk.text(LEAST_TOKENS // 2, 1)], desk.text(LEAST_TOKENS // 2 + 1), 0)


def test_caches_that_are_large_to_copy_are_left_alone() -> None:
    """A long conversation's short next question: its rows would be copied several times."""
    desk = Desk(FakeModel(context=10**6, width=512))
    row = desk.plan.padding(1)
    most = SMALL_PADDING // (COPIES * row)
    for length, fits in ((most // 2, True), (most // 2 + 1, False)):
        known = desk.prefill([3, *[4] * (length - 1)])
        known.sequence.cached_tokens = length - 5
        assert known.left == 5
        assert desk.together.gains([desk.text(5)], known, 0) is fits
    assert not desk.together.gains([desk.text(5, 1)], desk.text(5), desk.plan.free)


def test_one_that_another_makes_shorter_waits_for_it() -> None:
    desk = Desk(FakeModel())
    first = desk.prefill([1, 2, 3, 4, 5, 6])
    assert not desk.together.gains([first], desk.prefill([1, 2, 3, 4, 9]), 0)
    assert desk.together.gains([first], desk.prefill([1, 2, 8, 9]), 0)
    desk.together._remembers = False
    assert desk.together.gains([first], desk.prefill([1, 2, 3, 4, 9]), 0)


def test_what_it_took_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding counts: it is computed too."""
    desk = Desk(FakeModel(), hurried=True)
    group = [desk.text(45, 1), desk.text(20, 2)]
    clock = SimpleNamespace(perf_counter=iter([10.0, 10.0 + STALL]).__next__)
    monkeypatch.setattr("qwenvl_mlx.engine.together.time", clock)
    list(desk.together.run(group))
    assert desk.paces.most_tokens() == 90
    assert [one.sequence.prefilled for one in group] == [10.0 + STALL] * 2
    assert [one.cache.offset for one in group] == [45, 20]
    assert [one.logits.shape for one in group] == [(desk.model.vocab_size,)] * 2
