"""Questions and answers about scenes, in English and Chinese; phrases and shares are in questions.json."""

import json
from pathlib import Path
from random import Random
from typing import NamedTuple

from scenes import COLOURS, SHAPES, Grid, Scene, Thing, number_scene, random_grid, shape_scene, video_scenes

DATA = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
ASK, SAY, CHINESE, SHARES = (DATA[name] for name in ("ask", "say", "chinese", "shares"))
BIN = 25  # coordinates are multiples of this
BY = {"where": "name", "colour": "shape", "shape": "colour"}  # what a question names its thing by


class Turn(NamedTuple):
    """One question with its answer, and the thing that both are about."""

    kind: str
    question: str
    answer: str
    thing: Thing | None = None


Dialogue = list[Turn]


class Asker:
    """Asks about the pictures of one row in one language."""

    def __init__(self, rng: Random, scenes: list[Scene], lang: str) -> None:
        self.rng, self.scenes, self.lang = rng, scenes, lang
        self.scene = scenes[0] if scenes else None

    def words(self, thing: Thing | None) -> dict[str, str]:
        """What fills the gaps of phrases: "red circle" or "红色圆形", and its parts."""
        parts = {"thing": thing.name, "colour": thing.colour, "shape": thing.shape} if thing else {}
        if self.lang == "en":
            return parts
        return {gap: "".join(CHINESE[part] for part in name.split()) for gap, name in parts.items()}

    def ask(self, kind: str, answer: str, thing: Thing | None = None, phrase: str = "", **gaps: str) -> Turn:
        """A paraphrase of the question, now and then without its last mark or capital, and its answer."""
        text = self.rng.choice(ASK[phrase or kind][self.lang]).format(**self.words(thing), **gaps)
        text = text.rstrip("?.。？") if self.rng.random() < 0.15 else text
        text = text[0].lower() + text[1:] if self.rng.random() < 0.1 else text
        return Turn(kind, text, answer, thing)

    def tell(self, kind: str, thing: Thing | None = None) -> str:
        """The true answer; a box in the family's grounding form, with coordinates of 0 to 1000."""
        scene, gaps, said = self.scene, self.words(thing), SAY[self.lang]
        if kind == "where":
            size = scene.picture.size
            sides = [round(v / size[n % 2] * 1000 / BIN) * BIN for n, v in enumerate(thing.box)]
            return json.dumps([{"bbox_2d": sides, "label": gaps["thing"]}], ensure_ascii=False)
        if kind == "count":
            return said[kind][0 if scene.number else len(scene.things)]
        if kind == "describe" and not scene.number:
            comma, last, end, article = said["list"]
            names = [article + self.words(thing)["thing"] for thing in scene.things]
            text = last.join(filter(None, (comma.join(names[:-1]), names[-1]))) + end
            return text[0].upper() + text[1:]
        kind = "no_number" if kind == "number" and not scene.number else kind
        return said[kind].format(number=scene.number, **gaps)

    def alone(self, attribute: str) -> list[Thing]:
        """Things that share this attribute with no other thing."""
        values = [getattr(thing, attribute) for thing in self.scene.things]
        return [t for t in self.scene.things if values.count(getattr(t, attribute)) == 1]

    def absent(self) -> Thing:
        """A thing that is not there; half the time it shares colour or shape with one that is."""
        names, near = [thing.name for thing in self.scene.things], self.rng.choice(self.scene.things)
        every = [Thing(c, s, near.box) for c in COLOURS for s in SHAPES if f"{c} {s}" not in names]
        close = [thing for thing in every if (thing.colour == near.colour) != (thing.shape == near.shape)]
        return self.rng.choice(close if self.rng.random() < 0.5 else every)

    def turn(self, kind: str = "", thing: Thing | None = None, phrase: str = "") -> Turn:
        """A question of that or any kind, about `thing` or any, in its usual or another phrase."""
        scene, rng = self.scene, self.rng
        shares = SHARES["number" if scene.number else "shapes"]
        kinds = [k for k in shares if scene.number or self.alone(BY.get(k, "name"))]
        kind = kind or rng.choices(kinds, [shares[k] for k in kinds])[0]
        if kind == "is_there":
            yes = not scene.number and rng.random() < 0.5
            asked = self.ask(
                kind, SAY[self.lang][kind][yes], rng.choice(scene.things) if yes else self.absent()
            )
            return asked if yes else asked._replace(thing=None)
        thing = rng.choice(self.alone(BY[kind])) if kind in BY and not thing else thing
        return self.ask(kind, self.tell(kind, thing), thing, phrase)

    def follow_up(self) -> Dialogue:
        """Two turns; in most the second one needs the first."""
        first, about, scene = self.turn(), (), self.scene
        others = [thing for thing in self.alone("shape") if thing != first.thing]
        if scene.number:
            about = ("colour", scene.things[0], "it_colour") if first.kind == "number" else ()
        elif first.kind == "count":
            about = ("describe", None, "what")
        elif first.kind == "colour" and others and self.rng.random() < 0.5:
            about = ("colour", self.rng.choice(others), "and")
        elif first.thing and first.kind != "where":
            about = ("where", first.thing, "it_where")
        return [first, self.turn(*(about if self.rng.random() < 0.7 else ()))]

    def compare(self) -> Turn:
        """One question about two pictures of shapes."""
        kind, said = self.rng.choices(*zip(*SHARES["pair"].items(), strict=True))[0], SAY[self.lang]
        side, totals = self.rng.randrange(2), [len(scene.things) for scene in self.scenes]
        mine, others = (self.scenes[n].things for n in (side, 1 - side))
        only = [thing for thing in mine if thing.name not in [other.name for other in others]]
        if kind == "pair_count":
            return self.ask(kind, said["count"][totals[side]], nth=said["nth"][side])
        if kind == "which" and only:
            return self.ask(kind, said["more"][side], self.rng.choice(only))
        winner = 2 if totals[0] == totals[1] else totals.index(max(totals))
        return self.ask("more", said["more"][winner])

    def talk(self) -> Turn:
        """Small talk, and without a picture also a question that needs one."""
        kind, needs = (
            self.rng.choice(["who", "who", "can", "hello", "thanks"]),
            ["describe", "count", "number"],
        )
        blind = not self.scene and self.rng.random() < 0.4
        phrase = self.rng.choice(needs) if blind else kind
        return self.ask("talk", SAY[self.lang]["blind" if blind else kind], phrase=phrase)


def draw(rng: Random, kind: str, size: int) -> tuple[list[Grid], list[list[Scene]], list[list[Dialogue]]]:
    """Sizes; pictures and dialogues of each row about shapes, a number, a pair, a video or none (talk)."""
    pictures, largest, total = DATA["drawn"][kind]
    grids = [random_grid(rng, largest) for _ in range(pictures)]
    grids = grids * rng.choice([2, 2, 3, 4]) if kind == "video" else grids
    make, rows, dialogues = number_scene if kind == "number" else shape_scene, [], []
    for _ in range(size):
        way = rng.randrange(4)
        row = video_scenes(rng, grids, way) if kind == "video" else [make(rng, grid) for grid in grids]
        first, *others = askers = [Asker(rng, row, rng.choice(["en", "zh"])) for _ in range(total)]
        if kind == "pair":
            asked = [[first.compare(), first.compare()], *([asker.compare()] for asker in others)]
        elif kind == "video":
            asked = [[asker.ask("move", SAY[asker.lang]["move"][way])] for asker in askers]
            asked.append([first.turn(rng.choice(["colour", "describe"]))])
        else:
            asked = [first.follow_up(), *([asker.turn()] for asker in others)] if row else []
        rows.append(row)
        dialogues.append(asked + ([[first.talk()]] if not row or rng.random() < 0.05 else []))
    return grids, rows, dialogues
