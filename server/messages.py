"""OpenAI's messages -> the processor's: one form for old and new function calls, media as they came."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwenvl_mlx.server import schema
from qwenvl_mlx.server.errors import ApiError

LOW_DETAIL_PIXELS = 512 * 512
"""``"detail": "low"``: the side that OpenAI documents for it."""


def convert(
    messages: Sequence[schema.Message], *, low_pixels: int = LOW_DETAIL_PIXELS
) -> tuple[list[dict[str, Any]], str | None]:
    """The conversation, and the beginning of an answer that is to be continued (a last message of the assistant).

    ``low_pixels``: the area to which pictures of low detail are reduced.
    """
    if not any(message.role == "user" for message in messages):
        raise ApiError(400, "messages needs at least one message with role 'user'", param="messages")
    names: dict[str, str] = {}
    converted = [_message(message, names, place) for place, message in enumerate(messages)]
    for part in parts_of(converted):
        if part.pop("detail", None) == "low":
            part.setdefault("max_pixels", low_pixels)
    last = messages[-1]
    if not isinstance(last, schema.AssistantMessage):
        return converted, None
    if last.tool_calls or last.function_call:
        raise ApiError(
            400, "the last message calls a function: add its result", param=f"messages[{len(messages) - 1}]"
        )
    return converted[:-1], _plain_text(last.content, len(messages) - 1)


def _message(message: schema.Message, names: dict[str, str], place: int) -> dict[str, Any]:
    if isinstance(message, schema.SystemMessage):
        return {"role": "system", "content": _content(message.content)}
    if isinstance(message, schema.UserMessage):
        return {"role": "user", "content": _content(message.content)}
    if isinstance(message, schema.AssistantMessage):
        return _assistant(message, names, place)
    return _result(message, names, place)


def _assistant(message: schema.AssistantMessage, names: dict[str, str], place: int) -> dict[str, Any]:
    calls = [(call.id, call.function) for call in message.tool_calls or []]
    if message.function_call is not None:
        calls.append((f"call_{place}", message.function_call))
    if message.content is None and not calls:
        raise ApiError(
            400, f"messages[{place}] has neither content nor calls", param=f"messages[{place}].content"
        )
    result: dict[str, Any] = {"role": "assistant", "content": _content(message.content or "")}
    if message.reasoning_content:
        result["reasoning_content"] = message.reasoning_content
    if calls:
        names.update((identity, function.name) for identity, function in calls)
        names[""] = calls[-1][0]
        result["tool_calls"] = [
            {
                "id": identity,
                "type": "function",
                "function": {"name": function.name, "arguments": _arguments(function)},
            }
            for identity, function in calls
        ]
    return result


def _result(
    message: schema.ToolMessage | schema.FunctionMessage, names: dict[str, str], place: int
) -> dict[str, Any]:
    identity = message.tool_call_id if isinstance(message, schema.ToolMessage) else names.get("", "")
    if identity not in names:
        raise ApiError(
            400,
            f"messages[{place}] answers no function call of an earlier message",
            param=f"messages[{place}]",
        )
    name = message.name or names[identity]
    return {"role": "tool", "content": _content(message.content), "name": name, "tool_call_id": identity}


def _arguments(function: schema.Called) -> Any:
    """Templates want an object; what is none stays text."""
    try:
        value = json.loads(function.arguments)
    except (ValueError, RecursionError):
        return function.arguments
    return value if isinstance(value, dict) else function.arguments


def _content(content: schema.Content) -> str | list[dict[str, Any]]:
    return content if isinstance(content, str) else [_part(part) for part in content]


def _part(part: schema.Part) -> dict[str, Any]:
    if isinstance(part, schema.TextPart):
        return {"type": "text", "text": part.text}
    sizes = {"min_pixels": part.min_pixels, "max_pixels": part.max_pixels}
    if isinstance(part, schema.ImagePart | schema.ImageURLPart):
        return _without_none({"type": "image", "image": _source(part), "detail": _detail(part), **sizes})
    return _without_none({"type": "video", "video": _source(part), "fps": part.fps, **sizes})


def _source(part: schema.MediaPart) -> str | list[str]:
    if isinstance(part, schema.ImagePart):
        return part.image
    if isinstance(part, schema.VideoPart):
        return part.video
    given = part.image_url if isinstance(part, schema.ImageURLPart) else part.video_url
    return given if isinstance(given, str | list) else given.url


def _detail(part: schema.ImagePart | schema.ImageURLPart) -> str | None:
    url = part.image_url if isinstance(part, schema.ImageURLPart) else None
    return url.detail if isinstance(url, schema.ImageURL) else None


def media_of(message: schema.Message) -> list[schema.MediaPart]:
    """Pictures and videos of a message, as the request gives them."""
    content = message.content
    return (
        [part for part in content if not isinstance(part, schema.TextPart)]
        if isinstance(content, list)
        else []
    )


def parts_of(messages: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """All parts of all messages."""
    for message in messages:
        if not isinstance(message["content"], str):
            yield from message["content"]


def _without_none(part: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in part.items() if value is not None}


def _plain_text(content: schema.Content | None, place: int) -> str:
    if isinstance(content, str):
        return content
    parts = content or []
    if not all(isinstance(part, schema.TextPart) for part in parts):
        raise ApiError(
            400, "an answer to be continued can't hold pictures", param=f"messages[{place}].content"
        )
    return "".join(part.text for part in parts if isinstance(part, schema.TextPart))
