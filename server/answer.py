"""Read an answer while it grows: reasoning, content, calls of functions; one interface for all forms of calls."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qwenvl_mlx.processor import react
from qwenvl_mlx.processor.answer import AnswerSplitter, Piece
from qwenvl_mlx.processor.tool_calls import ToolCall


@dataclass(frozen=True)
class Call:
    """A function that the model calls; ``arguments``: JSON as text, or whatever the model wrote in its place."""

    name: str
    arguments: str


class Reader(Protocol):
    """Reads one choice's text."""

    def add(self, text: str) -> list[Piece | Call]:
        """What is certain after some more text."""

    def finish(self) -> list[Piece | Call]:
        """What was held back, at the end of the answer."""


class TaggedReader:
    """Tags around reasoning and calls. ``thinking``: the prompt has opened the reasoning; ``tools``: those offered."""

    def __init__(self, *, thinking: bool, tools: Sequence[Mapping[str, Any]] | None) -> None:
        self._splitter = AnswerSplitter(opened=thinking, tools=tools)

    def add(self, text: str) -> list[Piece | Call]:
        return _with_text_arguments(self._splitter.add(text))

    def finish(self) -> list[Piece | Call]:
        return _with_text_arguments(self._splitter.finish())


class ReactReader:
    """Thought, Action and Final Answer: nothing is certain before "Final Answer:" or the end."""

    def __init__(self) -> None:
        self._text = ""
        self._final = False

    def add(self, text: str) -> list[Piece | Call]:
        if not self._final:
            self._text += text
            place = self._text.find(react.FINAL)
            if place < 0:
                return []
            self._final, text = True, self._text[place + len(react.FINAL) :]
        return [Piece("content", text)] if text else []

    def finish(self) -> list[Piece | Call]:
        if self._final:
            return []
        content, call = react.parse(self._text)
        pieces: list[Piece | Call] = [Piece("content", content)] if content else []
        return pieces if call is None else [*pieces, Call(*call)]


def _with_text_arguments(found: Iterable[Piece | ToolCall]) -> list[Piece | Call]:
    return [
        Call(item.name, json.dumps(item.arguments, ensure_ascii=False))
        if isinstance(item, ToolCall)
        else item
        for item in found
    ]
