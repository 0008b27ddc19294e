"""Draw random scenes: one to four coloured shapes, or one printed number, on a plain light ground."""

import math
from dataclasses import dataclass
from itertools import pairwise
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Box = tuple[float, float, float, float]
Grid = tuple[int, int]  # cells of 32 pixels: down, across
Colour = tuple[int, ...]

COLOURS = {"red": (212, 42, 42), "green": (44, 160, 60), "blue": (45, 80, 215), "yellow": (232, 190, 25),
           "purple": (145, 50, 170), "black": (28, 28, 28)}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star")
FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "LiberationSans-Bold.ttf")
CELL = 32


@dataclass(frozen=True)
class Thing:
    """One object, with its box in pixels of the drawn picture."""

    colour: str
    shape: str
    box: Box

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A picture with what is in it: things from left to right, or digits of a number."""

    picture: Image.Image
    things: tuple[Thing, ...]
    number: str = ""
    digits: tuple[Box, ...] = ()


def random_grid(rng: Random, largest: int = 40) -> Grid:
    """A size of 3 to 10 cells a side, mostly small; areas beyond `largest` cells are rare, beyond 64 never."""
    while True:
        grid = 3 + int(8 * rng.random() ** 1.8), 3 + int(8 * rng.random() ** 1.8)
        if grid[0] * grid[1] <= largest or (grid[0] * grid[1] <= 64 and rng.random() < 0.15):
            return grid


def random_size(rng: Random, grid: Grid) -> tuple[int, int]:
    """A picture size (across, down) which the processor resizes to `grid`."""
    wobble = 15 if rng.random() < 0.5 else 0
    high, wide = (max(96, CELL * n + rng.randint(-wobble, wobble)) for n in grid)
    return wide, high


def tint(rng: Random, colour: str) -> Colour:
    return tuple(min(255, max(0, value + rng.randint(-18, 18))) for value in COLOURS[colour])


def ground(rng: Random) -> Colour:
    return tuple(rng.randint(228, 255) for _ in range(3))


def star(box: Box) -> list[tuple[float, float]]:
    """The corners of a star that touches all sides of `box`."""
    turns = [(math.pi * (n / 5 - 0.5), 0.42 if n % 2 else 1.0) for n in range(10)]
    axes = [[math.cos(t) * r for t, r in turns], [math.sin(t) * r for t, r in turns]]
    placed = []
    for axis, low, high in zip(axes, box[:2], box[2:], strict=True):
        scale = (high - low) / (max(axis) - min(axis))
        placed.append([low + (value - min(axis)) * scale for value in axis])
    return list(zip(*placed, strict=True))


def draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, fill: Colour) -> None:
    """Draw at twice the size, to be reduced later for smooth edges."""
    x1, y1, x2, y2 = (2 * value for value in thing.box)
    x2, y2 = x2 - 1, y2 - 1
    if thing.shape == "circle":
        draw.ellipse((x1, y1, x2, y2), fill=fill)
    elif thing.shape == "square":
        draw.rectangle((x1, y1, x2, y2), fill=fill)
    else:
        triangle = [((x1 + x2) / 2, y1), (x2, y2), (x1, y2)]
        draw.polygon(triangle if thing.shape == "triangle" else star((x1, y1, x2, y2)), fill=fill)


def place(rng: Random, size: tuple[int, int], count: int) -> list[Box]:
    """Boxes that do not touch, centres at least 8 pixels apart across; fewer when no room is left."""
    limit = min(110.0, 0.46 * min(size) if count > 1 else 0.7 * min(size))
    boxes: list[Box] = []
    for _ in range(60):
        side = rng.uniform(26, limit)
        x, y = rng.uniform(1, size[0] - side - 1), rng.uniform(1, size[1] - side - 1)
        new = (round(x), round(y), round(x + side), round(y + side))
        apart = (
            max(new[n] - b[n + 2] for n in (0, 1)) > 2 or max(b[n] - new[n + 2] for n in (0, 1)) > 2
            for b in boxes
        )
        if all(apart) and all(abs(new[0] + new[2] - b[0] - b[2]) >= 16 for b in boxes):
            boxes.append(new)
        if len(boxes) == count:
            break
    return sorted(boxes, key=lambda b: b[0] + b[2])


def shape_scene(rng: Random, grid: Grid) -> Scene:
    """One to four things, each pair of colour and shape at most once."""
    size = random_size(rng, grid)
    boxes = place(rng, size, rng.randint(1, 4))
    names = rng.sample([(c, s) for c in COLOURS for s in SHAPES], len(boxes))
    things = tuple(Thing(c, s, box) for (c, s), box in zip(names, boxes, strict=True))
    picture = Image.new("RGB", (2 * size[0], 2 * size[1]), ground(rng))
    draw = ImageDraw.Draw(picture)
    for thing in things:
        draw_thing(draw, thing, tint(rng, thing.colour))
    return Scene(picture.reduce(2), things)


def load_font(name: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.truetype(name, size)
    except OSError:  # the font is not installed here: Pillow brings one
        return ImageFont.load_default(size)


def number_scene(rng: Random, grid: Grid) -> Scene:
    """One printed number of one to three digits; digits are at least 18 pixels wide."""
    size = random_size(rng, grid)
    number = str(rng.randint(0, 10 ** rng.randint(1, 3) - 1))
    largest = int(min(110, 0.9 * size[1], 1.4 * size[0] / len(number)))
    font = load_font(rng.choice(FONTS), rng.randint(36, max(36, largest)))
    left, top, right, bottom = font.getbbox(number)
    x = rng.uniform(2, size[0] - right + left - 2) - left
    y = rng.uniform(2, size[1] - bottom + top - 2) - top
    picture = Image.new("RGB", size, ground(rng))
    colour = rng.choice(list(COLOURS))
    ImageDraw.Draw(picture).text((x, y), number, font=font, fill=tint(rng, colour))
    edges = [x + font.getlength(number[:n]) for n in range(len(number) + 1)]
    digits = tuple((a, y + top, b, y + bottom) for a, b in pairwise(edges))
    return Scene(
        picture, (Thing(colour, "number", (x + left, y + top, x + right, y + bottom)),), number, digits
    )


def patches(picture: Image.Image, grid: Grid) -> np.ndarray:
    """Resize as the processor does; rows of 16x16 patches in 2x2 blocks, channel first."""
    image = picture.resize((CELL * grid[1], CELL * grid[0]), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, np.float32) / 127.5 - 1
    rows = pixels.reshape(grid[0], 2, 16, grid[1], 2, 16, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return rows.reshape(-1, 768)
