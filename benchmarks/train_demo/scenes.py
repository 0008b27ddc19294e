"""Random scenes: one to four coloured shapes, or one printed number, on a plain light ground."""

from itertools import pairwise
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
Grid = tuple[int, int]  # cells of 32 pixels: down, across

COLOURS = {"red": (212, 42, 42), "green": (44, 160, 60), "blue": (45, 80, 215), "yellow": (232, 190, 25),
           "purple": (145, 50, 170), "black": (28, 28, 28)}  # fmt: skip
# How far out each corner is, and at which share of a half turn from the top
SHAPES = {"circle": ([1.0] * 60, np.arange(60) / 30), "square": ([1.0] * 4, np.arange(4) / 2 + 0.25),
          "triangle": ([1.0] * 3, np.array([0, 0.75, 1.25])), "star": ([1.0, 0.42] * 5, np.arange(10) / 5)}  # fmt: skip
FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "LiberationSans-Bold.ttf")


class Thing(NamedTuple):
    """A shape, or the printed number."""

    colour: str
    shape: str
    box: Box

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


class Scene(NamedTuple):
    """A picture and what is in it: things from left to right, or a number with the boxes of its digits.

    Of a video: two ``frames``, which the network sees as one picture.
    """

    picture: Image.Image
    things: tuple[Thing, ...]
    number: str = ""
    digits: tuple[Box, ...] = ()
    frames: tuple[Image.Image, ...] = ()


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


def place(rng: Random, size: tuple[int, int], count: int) -> list[Box]:
    """Boxes that do not touch, centres at least 8 pixels apart across; fewer when no room is left."""
    boxes: list[Box] = []
    for _ in range(60):
        side = rng.uniform(26, min(110.0, (0.46 if count > 1 else 0.7) * min(size)))
        x, y = (rng.uniform(1, length - side - 1) for length in size)
        new = (round(x), round(y), round(x + side), round(y + side))
        gaps = [max(max(new[n] - b[n + 2], b[n] - new[n + 2]) for n in (0, 1)) for b in boxes]
        apart = [abs(new[0] + new[2] - b[0] - b[2]) for b in boxes]
        if len(boxes) < count and min(gaps, default=9) > 2 and min(apart, default=16) >= 16:
            boxes.append(new)
    return sorted(boxes, key=lambda b: b[0] + b[2])


def paint(ground: Image.Image, things: tuple[Thing, ...], fills: list[tuple[int, ...]]) -> Image.Image:
    """The ground with things, at first twice as large for smooth edges."""
    picture = ground.resize((2 * ground.width, 2 * ground.height))
    for thing, fill in zip(things, fills, strict=True):
        far, turns = SHAPES[thing.shape]
        points = np.stack([np.sin(np.pi * turns), -np.cos(np.pi * turns)], 1) * np.array(far)[:, None]
        points, box = (points - points.min(0)) / np.ptp(points, 0), 2 * np.array(thing.box)
        outline = box[:2] + points * (box[2:] - box[:2] - 1)
        ImageDraw.Draw(picture).polygon([*map(tuple, outline)], fill=fill)
    return picture.reduce(2)


def shape_scene(rng: Random, grid: Grid) -> Scene:
    """One to four things, each pair of colour and shape at most once."""
    ground = empty(rng, grid)
    boxes = place(rng, ground.size, rng.randint(1, 4))
    names = rng.sample([(c, s) for c in COLOURS for s in SHAPES], len(boxes))
    things = tuple(Thing(*name, box) for name, box in zip(names, boxes, strict=True))
    return Scene(paint(ground, things, [tint(rng, thing.colour) for thing in things]), things)


def video_scenes(rng: Random, grids: list[Grid], way: int) -> list[Scene]:
    """A thing that moves left, right, up or down, in as many groups of two frames."""
    ground, total, axis = empty(rng, grids[0]), len(grids), way // 2
    name = (rng.choice(list(COLOURS)), rng.choice(list(SHAPES)))
    side, fill, size = rng.uniform(26, 0.5 * min(ground.size)), tint(rng, name[0]), ground.size
    travel = rng.uniform(0.25 * size[axis], size[axis] - side - 2)
    x, y = (rng.uniform(1, size[n] - side - 1 - travel * (n == axis)) for n in (0, 1))
    scenes, path = [], np.linspace(0, travel, 2 * total)[:: 1 if way % 2 else -1]
    for steps in path.reshape(total, 2):
        corners = [(x + step * (axis == 0), y + step * (axis == 1)) for step in (*steps, steps.mean())]
        things = [Thing(*name, (left, top, left + side, top + side)) for left, top in corners]
        first, second = (paint(ground, (thing,), [fill]) for thing in things[:2])
        scenes.append(Scene(Image.blend(first, second, 0.5), (things[2],), frames=(first, second)))
    return scenes


def number_scene(rng: Random, grid: Grid) -> Scene:
    """One printed number of one to three digits, each about 18 pixels wide or more."""
    picture, number = empty(rng, grid), str(rng.randint(0, 10 ** rng.randint(1, 3) - 1))
    largest = int(min(110, 0.9 * picture.height, 1.4 * picture.width / len(number)))
    font = ImageFont.truetype(rng.choice(FONTS), rng.randint(36, max(36, largest)))
    left, top, right, bottom = font.getbbox(number)
    x = rng.uniform(2, picture.width - right + left - 2) - left
    y = rng.uniform(2, picture.height - bottom + top - 2) - top
    thing = Thing(rng.choice(list(COLOURS)), "number", (x + left, y + top, x + right, y + bottom))
    ImageDraw.Draw(picture).text((x, y), number, font=font, fill=tint(rng, thing.colour))
    edges = [x + font.getlength(number[:n]) for n in range(len(number) + 1)]
    return Scene(picture, (thing,), number, tuple((a, y + top, b, y + bottom) for a, b in pairwise(edges)))
