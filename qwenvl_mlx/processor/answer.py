"""Tell reasoning, content and function calls of an answer apart while it streams, never half a tag."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from qwenvl_mlx.processor import tool_calls
from qwenvl_mlx.processor.tool_calls import ToolCall, Tools

State = Literal["reasoning", "content", "call"]

THINK, END_THINK = "<think>", "</think>"
_AFTER: dict[str, State] = {THINK: "reasoning", END_THINK: "content", tool_calls.OPEN: "call"}


@dataclass(frozen=True)
class Piece:
    """Some text of one kind."""

    kind: Literal["reasoning", "content"]
    text: str


@dataclass(frozen=True)
class Answer:
    """A whole answer; ``reasoning`` is None where the model did not reason."""

    content: str
    reasoning: str | None
    calls: tuple[ToolCall, ...]


class AnswerSplitter:
    """``opened``: the prompt ended inside ``<think>``. ``tools``: look for calls of these; None: don't look.

    Blank space around tags belongs to the tags. A call that is no valid call stays content, tags and all.
    """

    def __init__(self, *, opened: bool, tools: Tools | None = None) -> None:
        self._state: State = "reasoning" if opened else "content"
        self._tools = tools
        self._pending = ""  # may be the start of a tag, or blanks before one
        self._call = ""
        self._trim = opened  # blanks at the start of the present stretch belong to the tag before it
        self._begun = opened  # whether something came already: <think> counts only at the start

    def add(self, text: str) -> Iterator[Piece | ToolCall]:
        """What is certain after some more text."""
        self._pending += text
        while found := self._next_tag():
            at, tag = found
            before, self._pending = self._pending[:at], self._pending[at + len(tag) :]
            yield from self._leave(before, tag)
        yield from self._text(self._take_certain())

    def finish(self) -> Iterator[Piece | ToolCall]:
        """What was held back, at the end of the answer."""
        rest, self._pending = self._pending, ""
        if self._state == "call":
            yield from self._end_call(self._call + rest, closed=False)
        elif self._state == "content":
            yield from self._text(rest)
        else:
            yield from self._text(rest.rstrip())

    def _next_tag(self) -> tuple[int, str] | None:
        places = [(self._pending.find(tag), tag) for tag in self._tags()]
        return min((place for place in places if place[0] >= 0), default=None)

    def _tags(self) -> tuple[str, ...]:
        if self._state == "reasoning":
            return (END_THINK,)
        if self._state == "call":
            return (tool_calls.CLOSE,)
        call = () if self._tools is None else (tool_calls.OPEN,)
        return call if self._begun else (THINK, *call)

    def _leave(self, before: str, tag: str) -> Iterator[Piece | ToolCall]:
        """Go over to the stretch after ``tag``."""
        if tag == THINK and before.strip():
            yield from self._text(before + tag)  # in the middle of content it is only a word
            return
        if self._state == "call":
            yield from self._end_call(self._call + before, closed=True)
            self._state = "content"
        else:
            yield from self._text(before.rstrip())
            self._state = _AFTER[tag]
        self._begun = self._trim = True
        self._call = ""

    def _end_call(self, block: str, *, closed: bool) -> Iterator[Piece | ToolCall]:
        call = tool_calls.parse_call(block, self._tools or ())
        if call is not None:
            yield call
        else:
            yield Piece("content", tool_calls.OPEN + block + (tool_calls.CLOSE if closed else ""))

    def _take_certain(self) -> str:
        """The pending text but for what may belong to a tag that is still to come."""
        held = max((_overlap(self._pending, tag) for tag in self._tags()), default=0)
        certain = self._pending[: len(self._pending) - held]
        if self._tags():
            certain = certain.rstrip()
        self._pending = self._pending[len(certain) :]
        return certain

    def _text(self, text: str) -> Iterator[Piece]:
        if self._state == "call":
            self._call += text
            return
        if self._trim:
            text = text.lstrip()
        if text:
            self._trim, self._begun = False, self._begun or bool(text.strip())
            yield Piece(self._state, text)


def split_answer(text: str, *, opened: bool, tools: Tools | None = None) -> Answer:
    """A whole answer at once."""
    splitter = AnswerSplitter(opened=opened, tools=tools)
    events = [*splitter.add(text), *splitter.finish()]
    texts = {
        kind: [event.text for event in events if isinstance(event, Piece) and event.kind == kind]
        for kind in ("reasoning", "content")
    }
    calls = tuple(event for event in events if isinstance(event, ToolCall))
    return Answer(
        "".join(texts["content"]), "".join(texts["reasoning"]) if texts["reasoning"] else None, calls
    )


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of ``text`` that starts ``tag``."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)
