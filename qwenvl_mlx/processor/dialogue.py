"""OpenAI-style messages, or Qwen-VL's list format, as the dialogue that the original Qwen-VL was tuned on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenvl_mlx.errors import PromptError
from qwenvl_mlx.processor import react
from qwenvl_mlx.processor.base import Message
from qwenvl_mlx.processor.fetch import source_of
from qwenvl_mlx.processor.list_format import element_text, picture_label
from qwenvl_mlx.processor.messages import kind_of

ROLES = ("system", "user", "assistant", "tool")
OTHER_NAMES = {"developer": "system", "function": "tool"}


@dataclass(frozen=True)
class Picture:
    """A picture that is not loaded yet."""

    source: Any

    @property
    def path(self) -> str:
        """What a prompt can call it by; empty for a picture that has no path or URL."""
        named = isinstance(self.source, Path) or (
            isinstance(self.source, str) and self.source[:5].lower() != "data:"
        )
        return str(self.source) if named else ""


Content = list[str | Picture]


@dataclass(frozen=True)
class Dialogue:
    """``turns``: questions and answers so far (None where there was no answer). ``begun``: how the answer starts."""

    system: Content
    turns: list[tuple[Content, Content | None]]
    query: Content
    begun: Content


def read_dialogue(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> Dialogue:
    """Pictures of users are numbered over the whole of it. Functions and calls become text. ``PromptError``."""
    if isinstance(messages, (str, Mapping)) or not messages:
        raise PromptError('give at least one message: [{"role": "user", "content": "..."}]')
    known = [_known(message) for message in messages]
    begun: Any = None
    if tools or any(message["role"] == "tool" or message.get("tool_calls") for message in known):
        known, begun = react.write(
            [{**message, "content": _typed(message["content"])} for message in known],
            [tool.get("function", tool) for tool in tools],
        )
    system, known = _system(known)
    turns, query, answer = _turns(known)
    return Dialogue(system, turns, query, [*answer, *read_content(begun)])


def read_content(content: Any) -> Content:
    """Text, a part or a list of parts; nothing for None. Raises ``PromptError``."""
    if content is None:
        return []
    if isinstance(content, (str, Mapping)):
        content = [content]
    if not isinstance(content, Sequence):
        raise PromptError(f"content is a {type(content).__name__}: give text or a list of parts")
    return [_part(part) for part in content]


def _part(part: Any) -> str | Picture:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and "type" not in part and "image" not in part and "box" in part:
        return element_text(part)
    kind = kind_of(part)
    if kind == "video":
        raise PromptError("the original Qwen-VL knows no videos: give single pictures")
    return Picture(source_of(part, "image")) if kind == "image" else str(part.get("text") or "")


def _known(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise PromptError('every message needs a role: {"role": "user", "content": "..."}')
    role = OTHER_NAMES.get(message["role"], message["role"])
    if role not in ROLES:
        raise PromptError(f"a message of role {role!r} is not known; known: {', '.join(ROLES)}")
    return {**message, "role": role, "content": message.get("content")}


def _typed(content: Any) -> str | list[dict[str, Any]]:
    """The form that ``react`` takes: text, or parts that say their type."""
    if content is None or isinstance(content, str):
        return content or ""
    items = read_content(content)
    return [
        {"type": "text", "text": item} if isinstance(item, str) else {"type": "image", "image": item.source}
        for item in items
    ]


def _system(messages: list[dict[str, Any]]) -> tuple[Content, list[dict[str, Any]]]:
    first = messages[0]["role"] == "system"
    if any(message["role"] == "system" for message in messages[first:]):
        raise PromptError("a system message is only possible as the first one: move it there")
    if not first:
        return [react.DEFAULT_SYSTEM], messages
    return read_content(messages[0]["content"]), messages[1:]


def _turns(
    messages: Sequence[Mapping[str, Any]],
) -> tuple[list[tuple[Content, Content | None]], Content, Content]:
    """Turns so far, the last question, and what is already said of its answer."""
    turns: list[tuple[Content, Content | None]] = []
    pictures = 0
    for message in messages:
        content = read_content(message["content"])
        if message["role"] == "user":
            content, pictures = _numbered(content, pictures)
            turns.append((content, None))
        elif not turns:
            raise PromptError("the first message must be a user's: add the question")
        elif message["content"] is not None:
            question, answer = turns[-1]
            turns[-1] = (question, [*(answer or ()), *content])
    if not turns:
        raise PromptError("the conversation has no message of a user: add one")
    query, answer = turns.pop()
    return turns, query, answer or []


def _numbered(content: Content, pictures: int) -> tuple[Content, int]:
    """``Picture N: `` before and a newline after each picture; those inside of texts count as well."""
    numbered: Content = []
    for item in content:
        if isinstance(item, Picture):
            pictures += 1
            numbered += [picture_label(pictures), item, "\n"]
        else:
            pictures += item.count("</img>")
            numbered.append(item)
    return numbered, pictures
