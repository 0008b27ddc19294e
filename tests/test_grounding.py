"""Places that answers name are the reference's pixels, nothing that a model writes raises, and drawings show them."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from helpers import reference
from PIL import Image

from qwenvl_mlx.errors import PromptError
from qwenvl_mlx.processor.base import Box
from qwenvl_mlx.processor.grounding import draw, label_font, tagged_boxes
from qwenvl_mlx.processor.list_format import from_list_format, to_list_format


def golden(name: str) -> Any:
    return json.loads(reference(f"qwen_vl/goldens/{name}.json").read_text(encoding="utf-8"))


def test_lists_become_the_references_text() -> None:
    for case in golden("from_list_format"):
        if "error" in case:
            with pytest.raises(PromptError):
                from_list_format(case["list"])
        else:
            assert from_list_format(case["list"]) == case["text"]


def test_texts_become_the_references_lists() -> None:
    for case in golden("to_list_format"):
        if "error" in case:
            with pytest.raises(PromptError):
                to_list_format(case["text"])
        else:
            assert to_list_format(case["text"]) == case["list"]


def test_boxes_of_texts_equal_the_reference() -> None:
    for case in golden("to_list_format"):
        expected = []
        for box in case.get("boxes", ()):
            x1, y1, x2, y2 = (int(number / 1000 * 1000) for number in box["box"])
            expected.append(Box(((x1, y1), (x2, y2)), box.get("ref")))
        found = [box for box in tagged_boxes(case["text"], (1000, 1000), 0) if len(box.points) == 2]
        assert found == expected or "boxes_error" in case


def test_pixels_and_labels_equal_the_reference() -> None:
    for case in golden("draw_bbox"):
        if not case["returns_image"]:
            continue
        boxes = tagged_boxes(case["response"], tuple(case["size_wh"]), 3)
        drawn: list[dict[str, Any]] = []
        for box in boxes:
            assert box.image == 3
            drawn.append({"rect": [number for point in box.points for number in point]})
            if box.label:
                drawn.append({"label": box.label, "at": list(box.points[0])})
        keys = ("rect", "label", "at")
        assert drawn == [{key: call[key] for key in keys if key in call} for call in case["calls"]]


def test_quads_and_malformed_tags() -> None:
    quad = "<ref>sign</ref><quad>(0,0),(500,0),(500,999),(0,999)</quad>"
    assert tagged_boxes(quad, (200, 100), 0) == [Box(((0, 0), (100, 0), (100, 99), (0, 99)), "sign")]
    for text in (
        *("", "<box>", "<box>(1,2)", "<box>junk</box>", "<box>(1,2),(3)</box>", "<box>(1,2),(3,x)</box>"),
        *("<quad>(1,2),(3,4)</quad>", "</box>", "<ref>a</ref>", "<ref><box></ref></box>"),
        f"<box>({'9' * 5000},2),(3,4)</box>",
    ):
        assert tagged_boxes(text, (10, 10), 0) == []
    later = tagged_boxes("<box>(1,2</box> <ref>a</ref> <box>(0,0),(500,500)</box><box>(1,2", (10, 10), 0)
    assert later == [Box(((0, 0), (5, 5)))]  # a blank between: no label


def test_no_text_of_a_model_raises() -> None:
    rng = random.Random(0)
    pieces = [
        "<ref>",
        "</ref>",
        "<box>",
        "</box>",
        "<quad>",
        "</quad>",
        "(1,2),(3,4)",
        "(1,2)",
        ",",
        "狗",
        "-5",
        "<img>",
    ]
    for _ in range(2000):
        tagged_boxes("".join(rng.choices(pieces, k=rng.randrange(12))), (640, 480), 0)


def test_a_drawing_shows_the_boxes() -> None:
    picture = Image.new("RGB", (300, 200), "white")
    boxes = [
        Box(((20, 60), (120, 160)), "dog 狗"),
        Box(((250, 190), (150, 100))),  # corners in the wrong order
        Box(
            ((-50, -20), (2000, 2)),
            "a label far too long for a picture of this size, moved as far as it goes",
        ),
        Box(((200, 20), (280, 30), (270, 80), (190, 70)), "quad"),
    ]
    drawn = draw(picture, boxes)
    assert drawn.size == picture.size
    assert picture.getcolors() == [(300 * 200, (255, 255, 255))]  # the given one stays
    pixels = np.asarray(drawn).astype(int)
    blue = (31, 119, 180)
    assert tuple(pixels[120, 20]) == tuple(pixels[159, 70]) == blue  # left and lower edge
    assert tuple(pixels[150, 250]) == blue  # without a label: the colour before it
    assert tuple(pixels[120, 70]) == (255, 255, 255)  # not filled
    ground = pixels[60:76, 20:60].reshape(-1, 3)
    assert (ground == 51).all(axis=1).any()  # black at 80 percent on white
    assert draw(picture, []).tobytes() == picture.tobytes()


def test_there_is_always_a_font() -> None:
    assert label_font(15).getbbox("Ag") != label_font(40).getbbox("Ag")
