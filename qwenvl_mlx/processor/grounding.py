"""Places in pictures: the tags of the original Qwen-VL read as boxes in pixels, and boxes of any generation drawn."""

from __future__ import annotations

import colorsys
import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from qwenvl_mlx.processor.base import Box

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

TAGGED = re.compile(r"<(ref|box|quad|img)>(.*?)</\1>", re.DOTALL)
NUMBER = re.compile(r"\s*[+-]?\d{1,6}\s*")
CORNERS = {"box": 2, "quad": 4}

# The ten colours of Tableau, by hue: a new one for each label.
COLOURS = (
    "#1f77b4",
    "#ff7f0e",
    "#2ca02c",
    "#d62728",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#7f7f7f",
    "#bcbd22",
    "#17becf",
)
# Fonts that can write Chinese: macOS, then Linux. Pillow looks in the system's own folders.
FONTS = (
    *("PingFang.ttc", "Hiragino Sans GB.ttc", "STHeiti Medium.ttc", "Arial Unicode.ttf"),
    *("NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "wqy-microhei.ttc", "DroidSansFallbackFull.ttf"),
)


def tagged_boxes(text: str, size: tuple[int, int], image: int) -> list[Box]:
    """The ``<box>`` and ``<quad>`` tags of an answer about a picture of ``size`` (width, height) in pixels.

    Numbers in the text are thousandths of width and height; pixels are cut off, not rounded, and not clamped. A
    ``<ref>`` directly before gives the label. What is malformed or unclosed is passed over: it is a model's text.
    """
    boxes: list[Box] = []
    label, label_end = None, -1
    for tag in TAGGED.finditer(text):
        kind, inside = tag.groups()
        if kind in CORNERS:
            points = _points(inside, CORNERS[kind], size)
            if points is not None:
                boxes.append(Box(points, label if tag.start() == label_end else None, image))
        label, label_end = (inside.strip(), tag.end()) if kind == "ref" else (None, -1)
    return boxes


def draw(image: Image, boxes: Sequence[Box]) -> Image:
    """A copy of the picture with the boxes and their labels; a box without label keeps the colour before it."""
    from PIL import Image as pillow
    from PIL import ImageDraw

    picture = image.convert("RGB")
    overlay = pillow.new("RGBA", picture.size)
    pen, label_pen = ImageDraw.Draw(picture), ImageDraw.Draw(overlay)
    font_size = max(math.isqrt(picture.width * picture.height) // 30, 15)
    font, line = label_font(font_size), max(round(font_size / 4), 1)
    for box, colour in zip(boxes, _colours(boxes), strict=True):
        _outline(pen, box, colour, line)
        if box.label:
            _write(label_pen, box, colour, font)
    picture.paste(overlay, (0, 0), overlay)
    return picture


def label_font(size: int) -> FreeTypeFont | ImageFont:
    """A font of the system that has Chinese characters, else Pillow's own."""
    from PIL import ImageFont

    for name in FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue  # not installed
    return ImageFont.load_default(size)


def _points(text: str, count: int, size: tuple[int, int]) -> tuple[tuple[int, int], ...] | None:
    numbers = text.replace("(", "").replace(")", "").split(",")
    if len(numbers) != 2 * count or not all(map(NUMBER.fullmatch, numbers)):
        return None
    pixels = [int(int(number) / 1000 * size[i % 2]) for i, number in enumerate(numbers)]
    return tuple(zip(pixels[::2], pixels[1::2], strict=True))


def _colours(boxes: Sequence[Box]) -> Iterator[str]:
    turn = -1
    for box in boxes:
        if box.label or turn < 0:
            turn += 1
        yield COLOURS[turn % len(COLOURS)]


def _outline(pen: ImageDraw, box: Box, colour: str, width: int) -> None:
    if len(box.points) == 2:
        (x1, y1), (x2, y2) = box.points
        pen.rectangle((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), outline=colour, width=width)
    else:
        pen.line([*box.points, box.points[0]], fill=colour, width=width, joint="curve")


def _write(pen: ImageDraw, box: Box, colour: str, font: FreeTypeFont | ImageFont) -> None:
    """The label at the box's first corner, moved inside the picture, in a light tone on dark ground."""
    text = str(box.label)
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = pen.im.size
    x = max(0, min(box.points[0][0], width - math.ceil(right - left)))
    y = max(0, min(box.points[0][1], height - math.ceil(bottom - top)))
    pen.rectangle((x, y, x + right - left, y + bottom - top), fill=(0, 0, 0, 204))
    pen.text((x - left, y - top), text, font=font, fill=_light(colour))


def _light(colour: str) -> tuple[int, int, int, int]:
    """The colour with its strongest channel at 0.8 or more: readable on black."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
    light = colorsys.hsv_to_rgb(hue, saturation, max(value, 0.8))
    return (*(round(255 * channel) for channel in light), 255)  # type: ignore[return-value]
