"""Function calling, whatever the model's own form for it: what goes into the prompt, and how the answer is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qwenvl_mlx.processor import react
from qwenvl_mlx.processor.base import ToolFormat
from qwenvl_mlx.server import schema
from qwenvl_mlx.server.answer import ReactReader, Reader, TaggedReader
from qwenvl_mlx.server.errors import ApiError


@dataclass(frozen=True)
class Wish:
    """What a request says about functions, old fields and new ones alike.

    ``required``: a call must come; ``name``: of this function.
    """

    functions: tuple[dict[str, Any], ...] = ()
    required: bool = False
    name: str | None = None
    legacy: bool = False
    single: bool = False


@dataclass(frozen=True)
class Plan:
    """How functions get into the prompt, and how the answer is read.

    ``tools``: for the processor. ``begun``: with what the answer begins, because a call is demanded; ``hidden``: the
    part of it that its reader must know, although the model does not say it again.
    """

    form: ToolFormat
    tools: list[dict[str, Any]] | None = None
    begun: str = ""
    hidden: str = ""
    stops: tuple[str, ...] = ()

    def reader(self, *, thinking: bool) -> Reader:
        """Reads one choice."""
        reader: Reader
        if self.form == "react" and self.tools:
            reader = ReactReader()
        else:
            reader = TaggedReader(thinking=thinking, tools=self.tools)
        reader.add(self.hidden)
        return reader


def wish_of(body: schema.ChatRequest) -> Wish:
    """Read ``tools``, ``tool_choice``, ``functions`` and ``function_call``; 400 where they contradict each other."""
    if body.tools and body.functions:
        raise ApiError(400, "tools and functions can't be used together: send tools", param="functions")
    legacy = body.functions is not None and body.tools is None
    functions = _legacy(body) if legacy else _modern(body)
    choice = body.function_call if legacy else body.tool_choice
    param = "function_call" if legacy else "tool_choice"
    if not functions:
        if choice not in (None, "none", "auto"):
            raise ApiError(400, "a function is to be called, but none is given", param=param)
        return Wish(legacy=legacy)
    if choice == "none":
        return Wish(legacy=legacy)
    single = legacy or body.parallel_tool_calls is False
    if choice is None or choice == "auto":
        return Wish(functions, legacy=legacy, single=single)
    name = None if isinstance(choice, str) else _chosen(choice)
    if name is not None and name not in [function.get("name") for function in functions]:
        raise ApiError(400, f"{param} names {name!r}, which is none of the functions", param=param)
    # A choice of one function is one call; "required" may be several.
    return Wish(functions, required=True, name=name, legacy=legacy, single=single or name is not None)


def plan(wish: Wish, form: ToolFormat) -> Plan:
    """Choose for the model's own form of calls."""
    if not wish.functions:
        return Plan(form)
    tools = [{"type": "function", "function": function} for function in wish.functions]
    stops = (react.STOP,) if form == "react" else ()
    if not wish.required:
        return Plan(form, tools, stops=stops)
    hidden = _opening(form, wish.name)
    thought = "Thought: I should call a function." if form == "react" else ""
    return Plan(form, tools, thought + hidden, hidden, stops)


def _modern(body: schema.ChatRequest) -> tuple[dict[str, Any], ...]:
    tools = body.tools or []
    return tuple(tool.function.model_dump(exclude_none=True, exclude={"strict"}) for tool in tools)


def _legacy(body: schema.ChatRequest) -> tuple[dict[str, Any], ...]:
    functions = []
    for given in body.functions or []:
        function = given.model_dump(exclude_none=True)
        function.setdefault("name", function.get("name_for_model", ""))
        functions.append(function)
    return tuple(functions)


def _chosen(choice: schema.ToolChoice | schema.FunctionName) -> str:
    return choice.function.name if isinstance(choice, schema.ToolChoice) else choice.name


def _opening(form: ToolFormat, name: str | None) -> str:
    """How a call begins; after it the model can do nothing but finish the call."""
    if form == "react":
        return f"{react.CALL} {name}{react.ARGUMENTS}" if name else react.CALL
    if form == "xml":
        return f"<tool_call>\n<function={name}>\n" if name else "<tool_call>\n<function="
    return f'<tool_call>\n{{"name": "{name}", "arguments": ' if name else '<tool_call>\n{"name": "'
