"""Stop strings are found across pieces and never leak."""

from __future__ import annotations

import random

import pytest

from qwenvl_mlx.engine.stops import StopStrings


def feed(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    watch = StopStrings(stops)
    text = "".join(watch.add(piece) for piece in pieces)
    return text + watch.finish(), watch.found


def test_nothing_is_held_back_without_stop_strings() -> None:
    watch = StopStrings([])
    assert watch.add("abc") == "abc"


def test_a_possible_beginning_is_held_back_and_released() -> None:
    watch = StopStrings(["\nUser:"])
    assert watch.add("hello\nUs") == "hello"
    assert watch.add("ually") == "\nUsually"
    assert not watch.found


def test_the_earliest_of_several_wins() -> None:
    assert feed(["one END two ST", "OP"], ["STOP", "END"]) == ("one ", True)


def test_overlapping_beginnings() -> None:
    assert feed(["aa", "ab", "x"], ["aab"]) == ("a", True)


def test_empty_stop_strings_are_ignored() -> None:
    assert feed(["abc"], [""]) == ("abc", False)


@pytest.mark.parametrize("seed", range(20))
def test_any_cutting_gives_what_a_plain_search_gives(seed: int) -> None:
    chance = random.Random(seed)
    text = "".join(chance.choices("abc", k=60))
    stops = ["".join(chance.choices("abc", k=chance.randint(2, 4))) for _ in range(2)]
    places = [text.find(stop) for stop in stops if stop in text]
    cuts = sorted(chance.sample(range(60), 12))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, 60], strict=True)]
    # A later piece can't bring an earlier stop: the answer ends as soon as one is complete.
    ours, found = feed(pieces, stops)
    assert found == bool(places)
    assert text.startswith(ours)
    if found:
        assert any(text[len(ours) :].startswith(stop) for stop in stops)
    else:
        assert ours == text
