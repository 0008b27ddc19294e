"""Places are read out of answers as models really write them: fenced, cut off, in passing."""

from __future__ import annotations

import pytest

from qwenvl_mlx.processor.base import Box
from qwenvl_mlx.processor.grounding_json import THOUSAND, json_boxes, tagged_boxes

SIZE = (640, 480)
CAT = Box(((64, 96), (128, 144)), "cat")
CAT_JSON = '{"bbox_2d": [100, 200, 200, 300], "label": "cat"}'
DOG_JSON = '{"bbox_2d": [0, 0, 1000, 1000], "label": "dog"}'
DOG = Box(((0, 0), (640, 480)), "dog")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"[{CAT_JSON}, {DOG_JSON}]", [CAT, DOG]),
        (f"```json\n[\n\t{CAT_JSON},\n\t{DOG_JSON}\n]\n```", [CAT, DOG]),
        (f"Here they are: {CAT_JSON} and also {DOG_JSON}.", [CAT, DOG]),
        (f'{{"objects": [{CAT_JSON}]}}', [CAT]),
        (f"```json\n[{CAT_JSON}, {DOG_JSON[:24]}", [CAT]),
        (f'[{CAT_JSON}, {{"bbox_2d": [0, 0, 1000, 1000], "label": "do', [CAT, Box(DOG.points)]),
        (f"a {{brace}} before {CAT_JSON}", [CAT]),
        ('{"point_2d": [500, 250.5], "label": "nose"}', [Box(((320, 120),), "nose")]),
        (
            '{"bbox_2d": [[100, 200, 200, 300], [0, 0, 1000, 1000]], "label": "cat"}',
            [CAT, Box(DOG.points, "cat")],
        ),
        ('{"bbox_2d": [200, 300, 100, 200], "name": "cat"}', [CAT]),
        ('{"bbox_2d": [-5, 0, 2000, 1000], "text_content": "dog"}', [DOG]),
        (
            '{"bbox_2d": [0, 0, 1000, 0, 1000, 1000, 0, 1000]}',
            [Box(((0, 0), (640, 0), (640, 480), (0, 480)))],
        ),
        ('{"bbox_2d": [1, 2, 3], "label": "cat"}', []),
        ('{"bbox_2d": ["a", 2, 3, 4]}', []),
        ('{"bbox_2d": [1e999, 0, 1, 1]}', []),
        ('{"bbox_2d": "everywhere"}', []),
        ('{"label": "cat"}', []),
        ("no place at all {", []),
        ("", []),
    ],
)
def test_json(text: str, expected: list[Box]) -> None:
    assert json_boxes(text, THOUSAND, SIZE, image=0) == expected


def test_pixels_of_the_resized_picture() -> None:
    """Qwen2.5-VL counts in the picture that it was shown."""
    assert json_boxes(CAT_JSON, (400, 400), SIZE, image=2) == [Box(((160, 240), (320, 360)), "cat", 2)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "<|object_ref_start|>the cat<|object_ref_end|><|box_start|>(100,200),(200,300)<|box_end|>",
            [Box(CAT.points, "the cat")],
        ),
        (
            "<|object_ref_start|>cats<|object_ref_end|><|box_start|>(100, 200), (200, 300)<|box_end|>"
            "<|box_start|>(0,0),(1000,1000)<|box_end|>",
            [Box(CAT.points, "cats"), Box(DOG.points, "cats")],
        ),
        ("at <|box_start|>(100,200),(200,300)<|box_end|>", [Box(CAT.points)]),
        ("<|box_start|>(100,200)<|box_end|>", [Box(((64, 96),))]),
        (
            "<|quad_start|>(0,0),(1000,0),(1000,1000),(0,1000)<|quad_end|>",
            [Box(((0, 0), (640, 0), (640, 480), (0, 480)))],
        ),
        ("<|box_start|>(100,200),(200,", []),
        ("<|box_start|>nowhere<|box_end|>", []),
    ],
)
def test_tags_of_qwen2(text: str, expected: list[Box]) -> None:
    assert tagged_boxes(text, SIZE, image=0) == expected
