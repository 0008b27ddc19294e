"""Questions and answers about scenes, in English and Chinese; phrases and shares are in questions.json."""

import json
from pathlib import Path
from random import Random
from typing import NamedTuple

from scenes import COLOURS, SHAPES, Grid, Scene, Thing, number_scene, random_grid, shape_scene, video_scenes

PHRASES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
ASK, SAY, CHOICE, CHINESE, SHARES = (PHRASES[k] for k in ("ask", "say", "choice", "chinese", "shares"))
BIN = 25  # coordinates are multiples of this
TELLS = {"where": "name", "colour": "shape", "shape": "colour"}  # by what such a question names its thing


class Turn(NamedTuple):
    """One question with its answer, and the thing that both are about."""

    kind: str
    question: str
    answer: str
    thing: Thing | None = None


Dialogue = list[Turn]  # about the same picture or pictures
Batch = tuple[
    list[Grid], list[list[Scene]], list[list[Dialogue]]
]  # sizes; pictures and dialogues of each row


def ask(rng: Random, phrase: str, lang: str, **gaps: str) -> str:
    """A paraphrase of the question, now and then without its last mark or capital."""
    text = rng.choice(ASK[phrase][lang]).format(**gaps)
    text = text.rstrip("?.。？") if rng.random() < 0.15 else text
    return text[0].lower() + text[1:] if rng.random() < 0.1 else text


def words(thing: Thing | None, lang: str) -> dict[str, str]:
    """What fills the gaps of phrases: "red circle" or "红色圆形", and its parts."""
    parts = {"thing": thing.name, "colour": thing.colour, "shape": thing.shape} if thing else {}
    return {k: v if lang == "en" else "".join(CHINESE[part] for part in v.split()) for k, v in parts.items()}


def tell(kind: str, scene: Scene, lang: str, thing: Thing | None = None) -> str:
    """The answer to a question of that kind; a box in the family's grounding form, coordinates of 0 to 1000."""
    gaps = words(thing, lang) | {"number": scene.number}
    if kind == "where":
        sides = [round(v / scene.picture.size[n % 2] * 1000 / BIN) * BIN for n, v in enumerate(thing.box)]
        return json.dumps([{"bbox_2d": sides, "label": gaps["thing"]}], ensure_ascii=False)
    if kind == "count":
        return CHOICE[kind][lang][0 if scene.number else len(scene.things)]
    if kind == "describe" and not scene.number:
        comma, last, end, article = (", ", " and ", ".", "a ") if lang == "en" else ("、", "和", "。", "")
        names = [article + words(thing, lang)["thing"] for thing in scene.things]
        text = last.join(filter(None, (comma.join(names[:-1]), names[-1]))) + end
        return text[0].upper() + text[1:]
    kind = {"describe": "describe_number", "number": "number" if scene.number else "no_number"}.get(
        kind, kind
    )
    return SAY[kind][lang].format(**gaps)


def alone(scene: Scene, attribute: str) -> list[Thing]:
    """Things that share this attribute with no other thing."""
    values = [getattr(thing, attribute) for thing in scene.things]
    return [t for t in scene.things if values.count(getattr(t, attribute)) == 1]


def absent(rng: Random, scene: Scene) -> Thing:
    """A thing that is not there; half the time it shares colour or shape with one that is."""
    near = rng.choice(scene.things)
    while True:
        thing = Thing(rng.choice(list(COLOURS)), rng.choice(list(SHAPES)), near.box)
        if rng.random() < 0.5 and not scene.number:
            thing = rng.choice([thing._replace(colour=near.colour), thing._replace(shape=near.shape)])
        if thing.name not in [other.name for other in scene.things]:
            return thing


def turn(
    rng: Random, scene: Scene, lang: str, kind: str = "", thing: Thing | None = None, phrase: str = ""
) -> Turn:
    """A question of that or any kind, about `thing` or any, in its usual or another phrase."""
    shares, several = SHARES["number" if scene.number else "shapes"], len(scene.things) > 1
    kinds = [
        k
        for k in shares
        if scene.number or (alone(scene, TELLS.get(k, "name")) and (several or k != "beside"))
    ]
    kind = kind or rng.choices(kinds, [shares[k] for k in kinds])[0]
    if kind == "beside":
        return beside(rng, scene, lang)
    if kind == "is_there":
        yes = not scene.number and rng.random() < 0.5
        thing = rng.choice(scene.things) if yes else absent(rng, scene)
        asked, answer = ask(rng, kind, lang, **words(thing, lang)), CHOICE[kind][lang][yes]
        return Turn(kind, asked, answer, thing if yes else None)
    if kind in TELLS:
        thing = thing or rng.choice(alone(scene, TELLS[kind]))
    asked = ask(rng, phrase or kind, lang, **words(thing, lang))
    return Turn(kind, asked, tell(kind, scene, lang, thing), thing)


def beside(rng: Random, scene: Scene, lang: str) -> Turn:
    """Whether one thing is to the left of, to the right of, above or below another."""
    one, other = rng.sample(scene.things, 2)
    far = [one.box[n] + one.box[n + 2] - other.box[n] - other.box[n + 2] for n in (0, 1)]
    way = rng.randrange(4 if abs(far[1]) >= 16 else 2)
    gaps = {"other": words(other, lang)["thing"], "side": CHOICE["side"][lang][way]}
    answer = CHOICE["beside"][lang][(far[way // 2] > 0) == way % 2]
    return Turn("beside", ask(rng, "beside", lang, **words(one, lang), **gaps), answer)


def follow_up(rng: Random, scene: Scene, lang: str) -> Dialogue:
    """Two turns; in most the second one needs the first."""
    first, about = turn(rng, scene, lang), ()
    others = [thing for thing in alone(scene, "shape") if thing != first.thing]
    if scene.number:
        about = ("colour", scene.things[0], "it_colour") if first.kind == "number" else ()
    elif first.kind == "count":
        about = ("describe", None, "what")
    elif first.kind == "colour" and others and rng.random() < 0.5:
        about = ("colour", rng.choice(others), "and")
    elif first.thing and first.kind != "where":
        about = ("where", first.thing, "it_where")
    return [first, turn(rng, scene, lang, *(about if rng.random() < 0.7 else ()))]


def compare(rng: Random, scenes: list[Scene], lang: str) -> Turn:
    """One question about two pictures of shapes."""
    kind = rng.choices(*zip(*SHARES["pair"].items(), strict=True))[0]
    side, totals = rng.randrange(2), [len(scene.things) for scene in scenes]
    only = [t for t in scenes[side].things if t.name not in [other.name for other in scenes[1 - side].things]]
    if kind == "pair_count":
        asked = ask(rng, kind, lang, nth=CHOICE["nth"][lang][side])
        return Turn(kind, asked, tell("count", scenes[side], lang))
    if kind == "which" and only:
        asked = ask(rng, kind, lang, **words(rng.choice(only), lang))
        return Turn(kind, asked, CHOICE["more"][lang][side])
    winner = 2 if totals[0] == totals[1] else totals.index(max(totals))
    return Turn("more", ask(rng, "more", lang), CHOICE["more"][lang][winner])


def talk(rng: Random, blind: bool) -> Dialogue:
    """Small talk, and without a picture also a question that needs one."""
    kind, lang = rng.choice(["who", "who", "can", "hello", "thanks"]), rng.choice(["en", "zh"])
    said = "blind" if blind and rng.random() < 0.4 else kind
    kind = rng.choice(["describe", "count", "number"]) if said == "blind" else kind
    return [Turn("talk", ask(rng, kind, lang), SAY[said][lang])]


def draw(rng: Random, kind: str, size: int) -> Batch:
    """Rows about shapes, a number, a pair of pictures, a video or none (talk); first a dialogue of two turns."""
    largest, total = {
        "shapes": (24, 6),
        "number": (24, 3),
        "pair": (16, 6),
        "video": (12, 3),
        "talk": (0, 0),
    }[kind]
    grids = [random_grid(rng, largest) for _ in range({"pair": 2, "talk": 0}.get(kind, 1))]
    grids = grids * rng.choice([2, 2, 3, 4]) if kind == "video" else grids
    make, rows, dialogues = number_scene if kind == "number" else shape_scene, [], []
    for _ in range(size):
        (lang, *langs), way = rng.choices(["en", "zh"], k=max(1, total)), rng.randrange(4)
        row = video_scenes(rng, grids, way) if kind == "video" else [make(rng, grid) for grid in grids]
        if kind == "pair":
            two = [compare(rng, row, lang) for _ in range(2)]
            asked = [two, *([compare(rng, row, c)] for c in langs)]
        elif kind == "video":
            moved = Turn("move", ask(rng, "move", lang), CHOICE["move"][lang][way])
            asked = [[moved], *([turn(rng, row[0], c, rng.choice(["colour", "describe"]))] for c in langs)]
        else:
            asked = [follow_up(rng, row[0], lang), *([turn(rng, row[0], c)] for c in langs)] if row else []
        if not row or rng.random() < 0.05:
            asked.append(talk(rng, blind=not row))
        rows.append(row)
        dialogues.append(asked)
    return grids, rows, dialogues
