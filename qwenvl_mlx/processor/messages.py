"""Bring OpenAI-style messages into the one form that chat templates expect, and pick out their media."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwenvl_mlx.errors import PromptError
from qwenvl_mlx.processor.base import Message

ROLES = {"developer": "system", "function": "tool"}  # what OpenAI calls them -> what templates know
TEXT_KINDS = ("text", "input_text", "output_text", "refusal")
MEDIA_KINDS = ("image", "video")


@dataclass(frozen=True)
class Conversation:
    """``messages`` for a template; ``parts``: the media in them, in their order, as they were given."""

    messages: list[dict[str, Any]]
    parts: list[Mapping[str, Any]]


def conversation(messages: Sequence[Message], *, argument_text: bool) -> Conversation:
    """``argument_text``: leave a tool call's arguments as JSON text. Raises ``PromptError``."""
    if isinstance(messages, (str, Mapping)) or not messages:
        raise PromptError('give at least one message: [{"role": "user", "content": "..."}]')
    parts: list[Mapping[str, Any]] = []
    return Conversation(
        [_message(message, parts, argument_text=argument_text) for message in messages], parts
    )


def kind_of(part: Any) -> str:
    """ "text", "image" or "video": by the part's type, else by its keys. Raises ``PromptError``."""
    if isinstance(part, str):
        return "text"
    if not isinstance(part, Mapping):
        raise PromptError(
            f"a {type(part).__name__} is no part of a message: give text or a mapping with a type"
        )
    named = str(part.get("type", ""))
    for kind in MEDIA_KINDS:
        if named in (kind, f"{kind}_url", f"input_{kind}") or (
            not named and {kind, f"{kind}_url"} & part.keys()
        ):
            return kind
    if named in TEXT_KINDS or (not named and "text" in part):
        return "text"
    known = "text, image, image_url, video, video_url"
    raise PromptError(f"a part of type {named or sorted(part)!r} is not known; known: {known}")


def _message(message: Any, parts: list[Mapping[str, Any]], *, argument_text: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise PromptError('every message needs a role: {"role": "user", "content": "..."}')
    plain = dict(message)
    plain["role"] = ROLES.get(message["role"], message["role"])
    plain["content"] = _content(message.get("content"), parts)
    if plain.get("reasoning_content") is None and isinstance(message.get("reasoning"), str):
        plain["reasoning_content"] = message["reasoning"]
    if message.get("tool_calls"):
        plain["tool_calls"] = [_call(call, argument_text=argument_text) for call in message["tool_calls"]]
    return plain


def _content(content: Any, parts: list[Mapping[str, Any]]) -> str | list[dict[str, Any]]:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, Sequence):
        raise PromptError(f"content is a {type(content).__name__}: give text or a list of parts")
    return [_part(part, parts) for part in content]


def _part(part: Any, parts: list[Mapping[str, Any]]) -> dict[str, Any]:
    """A part without its source: templates only ask what it is."""
    kind = kind_of(part)
    if kind == "text":
        text = part if isinstance(part, str) else part.get("text", part.get("refusal"))
        return {"type": "text", "text": "" if text is None else str(text)}
    parts.append(part)
    return {"type": kind}


def _call(call: Any, *, argument_text: bool) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise PromptError(
            'a tool call must be {"type": "function", "function": {"name": ..., "arguments": ...}}'
        )
    inner = call.get("function", call)
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise PromptError("a tool call names no function: give its name")
    function = dict(inner)
    if not argument_text and isinstance(function.get("arguments"), str):
        function["arguments"] = _arguments(function["arguments"], function["name"])
    return {**call, "function": function} if "function" in call else function


def _arguments(text: str, name: str) -> Any:
    try:
        return json.loads(text) if text.strip() else {}
    except ValueError as error:
        raise PromptError(
            f"the arguments of the call to {name} are not JSON ({error}): send them whole"
        ) from error
