"""Function calls in answers: ``<tool_call>`` around JSON (Qwen2.5-VL, Qwen3-VL) or around tags (Qwen3.5)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
Tools = Sequence[Mapping[str, Any]]

_FUNCTION = re.compile(r"<function=(?P<name>[^>\n]+)>(?P<body>.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(
    r"<parameter=(?P<name>[^>\n]+)>\n?(?P<value>.*?)\n?(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL
)


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants called, with its arguments by name."""

    name: str
    arguments: dict[str, Any]


def parse_call(block: str, tools: Tools = ()) -> ToolCall | None:
    """What stands between ``<tool_call>`` and its end; None if it is no call.

    ``tools`` give the types of tagged arguments, which are text otherwise.
    """
    found = _FUNCTION.search(block)
    return _from_json(block) if found is None else _from_tags(found, tools)


def _from_json(block: str) -> ToolCall | None:
    try:
        call = json.loads(block)
        name = call["name"]
        arguments = call.get("arguments", call.get("parameters")) or {}
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return ToolCall(name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None


def _from_tags(found: re.Match[str], tools: Tools) -> ToolCall:
    name = found["name"].strip()
    types = _types(name, tools)
    arguments = {
        parameter["name"].strip(): _typed(parameter["value"], types.get(parameter["name"].strip()))
        for parameter in _PARAMETER.finditer(found["body"])
    }
    return ToolCall(name, arguments)


def _types(name: str, tools: Tools) -> dict[str, Any]:
    """The JSON schema types of a function's parameters."""
    for tool in tools:
        function = tool.get("function", tool)
        if function.get("name") == name:
            properties = (function.get("parameters") or {}).get("properties") or {}
            return {
                key: schema.get("type") if isinstance(schema, Mapping) else None
                for key, schema in properties.items()
            }
    return {}


def _typed(value: str, kind: Any) -> Any:
    """Text of an argument as the type its schema names; as it stands where it is not of that type."""
    if kind is None or kind == "string":
        return value
    try:
        return json.loads(value)
    except ValueError:
        return {"true": True, "false": False, "none": None}.get(value.strip().lower(), value)
