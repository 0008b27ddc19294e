"""Random scenes, and questions about them in English and Chinese; phrases, colours and shares are in data.json."""

import json
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Grid = tuple[int, int]  # cells of 32 pixels: down, across
DATA = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
ASK, SAY, CHINESE, SHARES, COLOURS = (DATA[name] for name in ("ask", "say", "chinese", "shares", "colours"))
# How far out each corner is, and at which share of a half turn from the top
SHAPES = {"circle": ([1.0] * 60, np.arange(60) / 30), "square": ([1.0] * 4, np.arange(4) / 2 + 0.25),
          "triangle": ([1.0] * 3, np.array([0, 0.75, 1.25])), "star": ([1.0, 0.42] * 5, np.arange(10) / 5)}  # fmt: skip
BIN = 25  # coordinates are multiples of this
BY = {"where": "name", "colour": "shape", "shape": "colour"}  # what a question names its thing by


class Thing(NamedTuple):
    """A shape, or the printed number; its left, top, right and bottom in pixels."""

    colour: str
    shape: str
    box: tuple[float, ...]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


class Scene(NamedTuple):
    """Things from left to right, or a number and its digits; of a video two frames, which the network sees as one."""

    picture: Image.Image
    things: tuple[Thing, ...]
    number: str = ""
    digits: tuple[tuple[float, ...], ...] = ()
    frames: tuple[Image.Image, ...] = ()


class Turn(NamedTuple):
    """One question with its answer, and the thing that both are about."""

    kind: str
    question: str
    answer: str
    thing: Thing | None = None


Dialogue = list[Turn]


def random_grid(rng: Random, largest: int) -> Grid:
    """3 to 10 cells a side, mostly few; areas beyond `largest` are rare, beyond 64 never."""
    while True:
        grid = 3 + int(8 * rng.random() ** 1.8), 3 + int(8 * rng.random() ** 1.8)
        if grid[0] * grid[1] <= (64 if rng.random() < 0.15 else largest):
            return grid


def empty(rng: Random, grid: Grid) -> Image.Image:
    """A ground of any size that the processor resizes to `grid`."""
    wobble = 15 if rng.random() < 0.5 else 0
    high, wide = (max(96, 32 * n + rng.randint(-wobble, wobble)) for n in grid)
    return Image.new("RGB", (wide, high), tuple(rng.randint(228, 255) for _ in range(3)))


def tint(rng: Random, colour: str) -> tuple[int, ...]:
    return tuple(min(255, max(0, value + rng.randint(-18, 18))) for value in COLOURS[colour])


def paint(ground: Image.Image, things: list[Thing], fills: list[tuple[int, ...]]) -> Image.Image:
    """The ground with things, at first twice as large for smooth edges."""
    picture = ground.resize((2 * ground.width, 2 * ground.height))
    for thing, fill in zip(things, fills, strict=True):
        far, turns = SHAPES[thing.shape]
        points = np.stack([np.sin(np.pi * turns), -np.cos(np.pi * turns)], 1) * np.array(far)[:, None]
        points, box = (points - points.min(0)) / np.ptp(points, 0), 2 * np.array(thing.box)
        ImageDraw.Draw(picture).polygon([*map(tuple, box[:2] + points * (box[2:] - box[:2] - 1))], fill=fill)
    return picture.reduce(2)


def shape_scene(rng: Random, grid: Grid) -> Scene:
    """One to four things (fewer when no room is left) that do not touch, centres at least 8 pixels apart across."""
    ground, count, boxes = empty(rng, grid), rng.randint(1, 4), []
    for _ in range(60):
        side = rng.uniform(26, min(110.0, (0.46 if count > 1 else 0.7) * min(ground.size)))
        x, y = (rng.uniform(1, length - side - 1) for length in ground.size)
        new = (round(x), round(y), round(x + side), round(y + side))
        gaps = [max(max(new[n] - b[n + 2], b[n] - new[n + 2]) for n in (0, 1)) for b in boxes]
        apart = [abs(new[0] + new[2] - b[0] - b[2]) for b in boxes]
        if len(boxes) < count and min(gaps, default=9) > 2 and min(apart, default=16) >= 16:
            boxes.append(new)
    names = rng.sample([(c, s) for c in COLOURS for s in SHAPES], len(boxes))
    boxes.sort(key=lambda b: b[0] + b[2])
    things = tuple(Thing(*name, box) for name, box in zip(names, boxes, strict=True))
    return Scene(paint(ground, things, [tint(rng, thing.colour) for thing in things]), things)


def video_scenes(rng: Random, grids: list[Grid], way: int) -> list[Scene]:
    """A thing that moves left, right, up or down, in as many groups of two frames."""
    ground, axis = empty(rng, grids[0]), way // 2
    name = (rng.choice(list(COLOURS)), rng.choice(list(SHAPES)))
    side, fill, size = rng.uniform(26, 0.5 * min(ground.size)), tint(rng, name[0]), ground.size
    travel = rng.uniform(0.25 * size[axis], size[axis] - side - 2)
    x, y = (rng.uniform(1, size[n] - side - 1 - travel * (n == axis)) for n in (0, 1))
    scenes, path = [], np.linspace(0, travel, 2 * len(grids))[:: 1 if way % 2 else -1]
    for steps in path.reshape(-1, 2):
        corners = [(x + step * (axis == 0), y + step * (axis == 1)) for step in (*steps, steps.mean())]
        *moving, thing = (Thing(*name, (left, top, left + side, top + side)) for left, top in corners)
        frames = tuple(paint(ground, [one], [fill]) for one in moving)
        scenes.append(Scene(Image.blend(*frames, 0.5), (thing,), frames=frames))
    return scenes


def number_scene(rng: Random, grid: Grid) -> Scene:
    """One printed number of one to three digits, each about 18 pixels wide or more."""
    picture, number = empty(rng, grid), str(rng.randint(0, 10 ** rng.randint(1, 3) - 1))
    largest = int(min(110, 0.9 * picture.height, 1.4 * picture.width / len(number)))
    font = ImageFont.truetype(rng.choice(DATA["fonts"]), rng.randint(36, max(36, largest)))
    left, top, right, bottom = font.getbbox(number)
    x = rng.uniform(2, picture.width - right + left - 2) - left
    y = rng.uniform(2, picture.height - bottom + top - 2) - top
    thing = Thing(rng.choice(list(COLOURS)), "number", (x + left, y + top, x + right, y + bottom))
    ImageDraw.Draw(picture).text((x, y), number, font=font, fill=tint(rng, thing.colour))
    edges = [x + font.getlength(number[:n]) for n in range(len(number) + 1)]
    return Scene(picture, (thing,), number, tuple((a, y + top, b, y + bottom) for a, b in pairwise(edges)))


class Asker:
    """Asks about the pictures of one row in one language."""

    def __init__(self, rng: Random, scenes: list[Scene]) -> None:
        self.rng, self.scenes, self.lang = rng, scenes, rng.choice(["en", "zh"])
        self.scene, self.said = scenes[0] if scenes else None, SAY[self.lang]

    def words(self, thing: Thing | None) -> dict[str, str]:
        """What fills the gaps of phrases: "red circle" or "红色圆形", and its parts."""
        parts = {"thing": thing.name, "colour": thing.colour, "shape": thing.shape} if thing else {}
        join = " ".join if self.lang == "en" else lambda words: "".join(CHINESE[word] for word in words)
        return {gap: join(name.split()) for gap, name in parts.items()}

    def ask(self, kind: str, answer: str, thing: Thing | None = None, phrase: str = "", **gaps: str) -> Turn:
        """A paraphrase of the question, now and then without its last mark or capital, and its answer."""
        text = self.rng.choice(ASK[phrase or kind][self.lang]).format(**self.words(thing), **gaps)
        text = text.rstrip("?.。？") if self.rng.random() < 0.15 else text
        text = text[0].lower() + text[1:] if self.rng.random() < 0.1 else text
        return Turn(kind, text, answer, thing)

    def tell(self, kind: str, thing: Thing | None = None) -> str:
        """The true answer; a box in the family's grounding form, with coordinates of 0 to 1000."""
        scene, gaps = self.scene, self.words(thing)
        if kind == "where":
            sides = [round(v / scene.picture.size[n % 2] * 1000 / BIN) * BIN for n, v in enumerate(thing.box)]
            return json.dumps([{"bbox_2d": sides, "label": gaps["thing"]}], ensure_ascii=False)
        if kind == "count":
            return self.said[kind][0 if scene.number else len(scene.things)]
        if kind == "describe" and not scene.number:
            comma, last, end, article = self.said["list"]
            names = [article + self.words(thing)["thing"] for thing in scene.things]
            text = last.join(filter(None, (comma.join(names[:-1]), names[-1]))) + end
            return text[0].upper() + text[1:]
        kind = "no_number" if kind == "number" and not scene.number else kind
        return self.said[kind].format(number=scene.number, **gaps)

    def alone(self, attribute: str) -> list[Thing]:
        """Things that share this attribute with no other thing."""
        values = [getattr(thing, attribute) for thing in self.scene.things]
        return [t for t in self.scene.things if values.count(getattr(t, attribute)) == 1]

    def is_there(self) -> Turn:
        """About a thing that is there; or one that is not, half the time with colour or shape of one that is."""
        rng, things = self.rng, self.scene.things
        if not self.scene.number and rng.random() < 0.5:
            return self.ask("is_there", self.said["is_there"][1], rng.choice(things))
        names, near = [thing.name for thing in things], rng.choice(things)
        every = [Thing(c, s, near.box) for c in COLOURS for s in SHAPES if f"{c} {s}" not in names]
        close = [thing for thing in every if (thing.colour == near.colour) != (thing.shape == near.shape)]
        thing = rng.choice(close if rng.random() < 0.5 else every)
        return self.ask("is_there", self.said["is_there"][0], thing)._replace(thing=None)

    def turn(self, kind: str = "", thing: Thing | None = None, phrase: str = "") -> Turn:
        """A question of that or any kind, about `thing` or any, in its usual or another phrase."""
        shares = SHARES["number" if self.scene.number else "shapes"]
        kinds = [k for k in shares if self.scene.number or self.alone(BY.get(k, "name"))]
        kind = kind or self.rng.choices(kinds, [shares[k] for k in kinds])[0]
        if kind == "is_there":
            return self.is_there()
        thing = self.rng.choice(self.alone(BY[kind])) if kind in BY and not thing else thing
        return self.ask(kind, self.tell(kind, thing), thing, phrase)

    def follow_up(self) -> Dialogue:
        """Two turns; in most the second one needs the first."""
        first, about = self.turn(), ()
        others = [thing for thing in self.alone("shape") if thing != first.thing]
        if self.scene.number:
            about = ("colour", self.scene.things[0], "it_colour") if first.kind == "number" else ()
        elif first.kind == "count":
            about = ("describe", None, "what")
        elif first.kind == "colour" and others and self.rng.random() < 0.5:
            about = ("colour", self.rng.choice(others), "and")
        elif first.thing and first.kind != "where":
            about = ("where", first.thing, "it_where")
        return [first, self.turn(*(about if self.rng.random() < 0.7 else ()))]

    def compare(self) -> Turn:
        """One question about two pictures of shapes."""
        kind = self.rng.choices(*zip(*SHARES["pair"].items(), strict=True))[0]
        side, totals = self.rng.randrange(2), [len(scene.things) for scene in self.scenes]
        mine, others = (self.scenes[n].things for n in (side, 1 - side))
        only = [thing for thing in mine if thing.name not in [other.name for other in others]]
        if kind == "pair_count":
            return self.ask(kind, self.said["count"][totals[side]], nth=self.said["nth"][side])
        if kind == "which" and only:
            return self.ask(kind, self.said["more"][side], self.rng.choice(only))
        return self.ask("more", self.said["more"][2 if totals[0] == totals[1] else totals[1] > totals[0]])

    def talk(self) -> Turn:
        """Small talk, and without a picture also a question that needs one."""
        kind = self.rng.choice(["who", "who", "can", "hello", "thanks"])
        blind = not self.scene and self.rng.random() < 0.4
        phrase = self.rng.choice(["describe", "count", "number"]) if blind else kind
        return self.ask("talk", self.said["blind" if blind else kind], phrase=phrase)


def draw(rng: Random, kind: str, size: int) -> tuple[list[Grid], list[list[Scene]], list[list[Dialogue]]]:
    """Sizes; pictures and dialogues of each row about shapes, a number, a pair, a video or none (talk)."""
    pictures, largest, total = DATA["drawn"][kind]
    grids, rows, dialogues = [random_grid(rng, largest) for _ in range(pictures)], [], []
    grids = grids * rng.choice([2, 2, 3, 4]) if kind == "video" else grids
    make = number_scene if kind == "number" else shape_scene
    for _ in range(size):
        way = rng.randrange(4)
        row = video_scenes(rng, grids, way) if kind == "video" else [make(rng, grid) for grid in grids]
        first, *others = askers = [Asker(rng, row) for _ in range(total)]
        if kind == "pair":
            asked = [[first.compare(), first.compare()], *([asker.compare()] for asker in others)]
        elif kind == "video":
            asked = [[asker.ask("move", asker.said["move"][way])] for asker in askers]
            asked.append([first.turn(rng.choice(["colour", "describe"]))])
        else:
            asked = [first.follow_up(), *([asker.turn()] for asker in others)] if row else []
        rows.append(row)
        dialogues.append(asked + ([[first.talk()]] if not row or rng.random() < 0.05 else []))
    return grids, rows, dialogues
