"""Qwen-VL's own list format: ``[{"image": path}, {"text": …}, {"ref": …, "box": [[x1, y1, x2, y2]]}]`` and its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwenvl_mlx.errors import PromptError
from qwenvl_mlx.processor.grounding import TAGGED
from qwenvl_mlx.processor.qwen_tokenizer import END_OF_TEXT, IMAGE_TAGS, SPECIALS, normal_form

OPENING = ("<ref>", "<box>", "<quad>", "<img>")
NOT_ALLOWED = frozenset(SPECIALS) - {*IMAGE_TAGS, END_OF_TEXT}


def from_list_format(elements: Sequence[Mapping[str, Any]]) -> str:
    """The list as one text, its pictures numbered from 1. Raises ``PromptError`` for an unknown element."""
    written, pictures = [], 0
    for element in elements:
        if "image" in element:
            pictures += 1
            written.append(f"{picture_label(pictures)}<img>{element['image']}</img>\n")
        else:
            written.append(element_text(element))
    return "".join(written)


def picture_label(number: int) -> str:
    return f"Picture {number}: "


def element_text(element: Mapping[str, Any]) -> str:
    """An element that is no picture."""
    if "text" in element:
        return str(element["text"])
    if "box" not in element:
        raise PromptError(
            f"an element with {', '.join(map(str, element)) or 'nothing'} is not known: give image, text or box"
        )
    label = f"<ref>{element['ref']}</ref>" if "ref" in element else ""
    try:
        corners = [tuple(int(number) for number in box) for box in element["box"]]
        return label + "".join(f"<box>({x1},{y1}),({x2},{y2})</box>" for x1, y1, x2, y2 in corners)
    except (TypeError, ValueError) as error:
        raise PromptError('a box is no list of [x1, y1, x2, y2]: give {"box": [[1, 2, 3, 4]]}') from error


def to_list_format(text: str) -> list[dict[str, str]]:
    """A text cut at its tags; tags inside of tags stay text. Raises ``PromptError`` for an unclosed tag."""
    text = normal_form(text)
    for name in NOT_ALLOWED:
        if name in text:
            raise PromptError(f"{name} can't be part of a message: leave it out")
    elements: list[dict[str, str]] = []
    at = 0
    for tag in TAGGED.finditer(text):
        elements += _plain(text[at : tag.start()])
        kind, inside = tag.groups()
        elements.append({"image" if kind == "img" else kind: inside})
        at = tag.end()
    return elements + _plain(text[at:])


def _plain(text: str) -> list[dict[str, str]]:
    for tag in OPENING:
        if tag in text:
            raise PromptError(f"{tag} is not closed: write {tag}…</{tag[1:]}")
    return [{"text": text}] if text else []
