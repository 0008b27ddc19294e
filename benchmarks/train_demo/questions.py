"""Questions and answers about scenes, in English and Chinese; the phrases are in questions.json."""

import json
from pathlib import Path
from random import Random
from typing import NamedTuple

from scenes import COLOURS, SHAPES, Scene, Thing

PHRASES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
CHINESE, CHOICE, SAY = PHRASES["chinese"], PHRASES["choice"], PHRASES["say"]
LANGS = ("en", "zh")
BIN = 25  # coordinates are multiples of this


class Turn(NamedTuple):
    """One question with its answer."""

    kind: str
    question: str
    answer: str


Dialogue = tuple[Turn, ...]  # about the same picture or pictures


def ask(rng: Random, kind: str, lang: str, **words: str) -> str:
    """A paraphrase of the question, now and then without its last mark or capital."""
    text = rng.choice(PHRASES["ask"][kind][lang]).format(**words)
    if rng.random() < 0.15:
        text = text.rstrip("?.。？")
    return text[0].lower() + text[1:] if rng.random() < 0.1 else text


def word(name: str, lang: str) -> str:
    """A thing, colour or shape in that language: "red circle" or "红色圆形"."""
    return name if lang == "en" else "".join(CHINESE[part] for part in name.split())


def tell(kind: str, scene: Scene, lang: str, thing: Thing | None = None) -> str:
    """The answer to a question of that kind, about one thing of the scene or all of it."""
    if kind == "where" and thing:
        return box_answer(thing, scene.picture.size, lang)
    if kind == "count":
        return CHOICE[kind][lang][0 if scene.number else len(scene.things)]
    if kind == "describe" and not scene.number:
        return describe([word(thing.name, lang) for thing in scene.things], lang)
    words = {"colour": word(thing.colour, lang), "shape": word(thing.shape, lang)} if thing else {}
    if kind in ("describe", "number"):
        kind = "describe_number" if kind == "describe" else kind if scene.number else "no_number"
    return SAY[kind][lang].format(number=scene.number, **words)


def box_answer(thing: Thing, size: tuple[int, int], lang: str) -> str:
    """The grounding form of the family: JSON with coordinates of 0 to 1000."""
    numbers = (round(v / size[n % 2] * 1000 / BIN) * BIN for n, v in enumerate(thing.box))
    return f'[{{"bbox_2d": [{", ".join(map(str, numbers))}], "label": "{word(thing.name, lang)}"}}]'


def describe(names: list[str], lang: str) -> str:
    """All things from left to right as one sentence."""
    comma, last, end = (", ", " and ", ".") if lang == "en" else ("、", "和", "。")
    names = [f"a {name}" for name in names] if lang == "en" else names
    text = last.join(filter(None, (comma.join(names[:-1]), names[-1])))
    return text[0].upper() + text[1:] + end


def alone(scene: Scene, attribute: str) -> list[Thing]:
    """Things that share this attribute with no other thing."""
    values = [getattr(thing, attribute) for thing in scene.things]
    return [t for t in scene.things if values.count(getattr(t, attribute)) == 1]


def absent(rng: Random, scene: Scene) -> str:
    """A thing that is not there; half the time it shares colour or shape with one that is."""
    near = rng.choice(scene.things)
    while True:
        c, s = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        if rng.random() < 0.5 and near.shape in SHAPES:
            c, s = (near.colour, s) if rng.random() < 0.5 else (c, near.shape)
        if all(thing.name != f"{c} {s}" for thing in scene.things):
            return f"{c} {s}"
