"""Places in the answers of Qwen2-VL and later, turned into pixels of the source picture.

Qwen2-VL     <|object_ref_start|>cat<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>, 0 to 1000
Qwen2.5-VL   [{"bbox_2d": [x1, y1, x2, y2], "label": "cat"}], pixels of the resized picture
Qwen3-VL …   the same JSON, 0 to 1000
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from qwenvl_mlx.processor.base import Box

Size = tuple[int, int]
THOUSAND = (1000, 1000)
LABELS = ("label", "name", "text_content", "text", "category", "description")

_TAGGED = re.compile(
    r"<\|object_ref_start\|>(?P<label>.*?)<\|object_ref_end\|>"
    r"|<\|(?P<kind>box|quad)_start\|>(?P<points>[\s(),\d.]*?)<\|(?P=kind)_end\|>",
    re.DOTALL,
)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_CUT_OFF = re.compile(r'\{\s*"(?P<key>bbox_2d|point_2d)"\s*:\s*(?P<numbers>\[[-\d.,\s]*\])')


def tagged_boxes(text: str, source: Size, *, image: int) -> list[Box]:
    """Places between Qwen2-VL's tags; a label holds for the boxes that follow it. ``source``: (width, height)."""
    boxes, label = [], None
    for found in _TAGGED.finditer(text):
        if found["label"] is not None:
            label = found["label"].strip()
            continue
        numbers = [float(number) for number in _NUMBER.findall(found["points"])]
        boxes += _boxes(numbers, label, THOUSAND, source, image)
    return boxes


def json_boxes(text: str, scale: Size, source: Size, *, image: int) -> list[Box]:
    """Places in JSON, fenced or bare. ``scale``: what the coordinates run to; ``source``: (width, height) in pixels.

    Whatever is whole is used: objects of a list that breaks off, and the box of an object whose label does.
    """
    boxes = []
    for item in _objects(text):
        label = next((str(item[key]) for key in LABELS if isinstance(item.get(key), (str, int))), None)
        for key in ("bbox_2d", "point_2d"):
            boxes += _boxes(item.get(key), label, scale, source, image)
    return boxes


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Every JSON object with a place in it, also those inside others; what is no JSON is passed over."""
    decoder = json.JSONDecoder()
    at = text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
            if cut_off := _CUT_OFF.match(text, at):
                value = {cut_off["key"]: [float(number) for number in _NUMBER.findall(cut_off["numbers"])]}
                yield value
        else:
            yield from _with_places(value)
        at = text.find("{", end)


def _with_places(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if "bbox_2d" in value or "point_2d" in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _with_places(inner)


def _boxes(numbers: Any, label: str | None, scale: Size, source: Size, image: int) -> list[Box]:
    """2, 4 or 8 numbers are a point, two corners, or four; a list of such lists is several places."""
    if not isinstance(numbers, list):
        return []
    if numbers and all(isinstance(inner, list) for inner in numbers):
        return [box for inner in numbers for box in _boxes(inner, label, scale, source, image)]
    if len(numbers) not in (2, 4, 8) or not all(_is_coordinate(number) for number in numbers):
        return []
    across = [_pixel(number, scale[0], source[0]) for number in numbers[::2]]
    down = [_pixel(number, scale[1], source[1]) for number in numbers[1::2]]
    if len(numbers) == 4:  # the upper left corner first, whichever the model named first
        across, down = sorted(across), sorted(down)
    return [Box(tuple(zip(across, down, strict=True)), label, image)]


def _is_coordinate(number: Any) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)


def _pixel(value: float, scale: int, size: int) -> int:
    return min(max(int(value / scale * size), 0), size)
