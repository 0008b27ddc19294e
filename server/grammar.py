"""Answers that must be JSON, or a call of a function: grammars for llguidance, an extra.

The grammar is compiled in a thread before the request is queued; the engine then asks for the tokens that may come.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qwenvl_mlx.processor.answer import END_THINK
from qwenvl_mlx.processor.tool_calls import CLOSE, OPEN
from qwenvl_mlx.server import schema
from qwenvl_mlx.server.errors import ApiError
from qwenvl_mlx.server.tools import Wish

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from qwenvl_mlx.engine import Engine

MISSING = "needs the extra 'grammar': pip install 'qwenvl-mlx[grammar]'"

LONGEST = 100_000
"""Characters of a request's schemas."""

WHITESPACE = r"(\r?\n)?[ \t]{0,32}"
"""Between two parts of JSON: a line break and an indent. Without an end, some models write nothing else."""


class Guide:
    """Which tokens may come next in one answer. ``wait_for``: the token before which anything may come."""

    def __init__(self, matcher: LLMatcher, size: int, eos: Sequence[int], *, wait_for: int | None) -> None:
        self._matcher = matcher
        self._size = size
        self._eos = list(eos)
        self._waits_for = wait_for

    def allowed(self) -> NDArray[np.bool_]:
        """``[vocab]``"""
        if self._waits_for is not None:
            return np.ones(self._size, np.bool_)
        if self._matcher.is_error() or self._matcher.is_stopped():
            return self._only_end()
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, count=self._size, bitorder="little").astype(np.bool_)
        return allowed if allowed.any() else self._only_end()

    def accept(self, token: int) -> None:
        """Take note of the token that was chosen."""
        if self._waits_for is None:
            self._matcher.consume_token(token)
        elif token == self._waits_for:
            self._waits_for = None

    def _only_end(self) -> NDArray[np.bool_]:
        allowed = np.zeros(self._size, np.bool_)
        allowed[self._eos] = True
        return allowed


class Grammars:
    """Compiles grammars for one model; its vocabulary is read when the first one is needed (about a second)."""

    def __init__(self, engine: Engine) -> None:
        self.processor = engine.processor
        self._size = engine.model.vocab_size
        self._tokenizer: LLTokenizer | None = None

    def tag(self, text: str) -> str:
        """A tag in a grammar: the token that it is, else its text."""
        token = self.processor.tokenizer.id(text)
        return json.dumps(text) if token is None else f"<[{token}]>"

    def compile(self, grammar: str, *, param: str, after_thinking: bool) -> Callable[[], Guide]:
        """A maker of guides, one for each choice. Raises ``ApiError`` for a grammar that is none."""
        from llguidance import LLMatcher

        if len(grammar) > LONGEST:  # compiling takes seconds then
            raise ApiError(400, f"{param} has schemas of more than {LONGEST} characters", param=param)
        eos = sorted(self.processor.defaults.eos_token_ids)
        if self._tokenizer is None:
            self._tokenizer = _vocabulary(self.processor.tokenizer.to_json(), self._size, eos)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().strip().splitlines()[0][:300]
            raise ApiError(400, f"{param} can't be used: {reason}", param=param, code="invalid_schema")
        wait_for = self.processor.tokenizer.id(END_THINK) if after_thinking else None
        return lambda: Guide(matcher.deep_copy(), self._size, eos, wait_for=wait_for)


def for_chat(
    body: schema.ChatRequest, wish: Wish, grammars: Grammars, *, thinking: bool
) -> Callable[[], Guide] | None:
    """What a request demands of the form of its answer, or None. Slow: for a thread."""
    kind = grammars.processor.tool_format
    wanted = body.response_format
    if wanted is not None and wanted.type != "text":
        if wish.functions:
            raise ApiError(400, "response_format and tools can't be used together", param="response_format")
        return _for_format(wanted, grammars, thinking=thinking)
    strict = [tool.function.name for tool in body.tools or [] if tool.function.strict]
    if strict and (kind != "json" or not available()):
        reason = "is not possible with this model's form of calls" if kind != "json" else MISSING
        raise ApiError(400, f"tools: strict {reason}", param="tools")
    if wish.required and kind == "json" and available():
        return grammars.compile(_forced_call(wish, grammars), param="tools", after_thinking=False)
    if strict:
        return grammars.compile(_free_calls(wish, strict, grammars), param="tools", after_thinking=thinking)
    return None


def available() -> bool:
    """Whether llguidance is installed."""
    from importlib.util import find_spec

    return find_spec("llguidance") is not None


def _for_format(
    wanted: schema.JSONObjectFormat | schema.JSONSchemaFormat, grammars: Grammars, *, thinking: bool
) -> Callable[[], Guide]:
    if not available():
        raise ApiError(400, f"response_format {wanted.type!r} {MISSING}", param="response_format")
    structure: Mapping[str, Any] = {"type": "object"}
    if isinstance(wanted, schema.JSONSchemaFormat):
        structure = wanted.json_schema.schema_
    # After the reasoning come two newlines, which the model writes itself.
    before = r"/\s*/ " if thinking else ""
    return grammars.compile(
        f"start: {before}answer\nanswer: {_json(structure)}", param="response_format", after_thinking=thinking
    )


def _forced_call(wish: Wish, grammars: Grammars) -> str:
    """What follows ``tools.opening``: the name, if it is open, and arguments by the function's schema."""
    functions = [function for function in wish.functions if wish.name in (None, function["name"])]
    rules = [f"a{i}: {_json(function.get('parameters'))}" for i, function in enumerate(functions)]
    end = f'"}}\\n" {grammars.tag(CLOSE)}'
    if wish.name is not None:
        return "\n".join([f"start: a0 {end}", *rules])
    named = [json.dumps(f'{function["name"]}", "arguments": ') for function in functions]
    calls = [f"f{i}: {name} a{i} {end}" for i, name in enumerate(named)]
    start = "start: " + " | ".join(f"f{i}" for i in range(len(functions)))
    return "\n".join([start, *calls, *rules])


def _free_calls(wish: Wish, strict: Sequence[str], grammars: Grammars) -> str:
    """Any text, in which calls have arguments by their functions' schemas (any object for the others)."""
    opening, end = grammars.tag(OPEN), f'"}}\\n" {grammars.tag(CLOSE)}'
    lines = []
    for i, function in enumerate(wish.functions):
        begun = json.dumps(f'\n{{"name": "{function["name"]}", "arguments": ')
        wanted = function.get("parameters") if function["name"] in strict else None
        # As text, the tag ends the lexeme before it as soon as it is complete; as a token it is one by itself.
        head = f"h{i}[lazy]: TEXT {opening}" if opening.startswith('"') else f"h{i}: TEXT {opening}"
        lines += [head, f"f{i}: h{i} {begun} a{i} {end}", f"a{i}: {_json(wanted)}"]
    calls = " | ".join(f"f{i}" for i in range(len(wish.functions)))
    return "\n".join([f"start: ({calls})* rest", "rest: TEXT", r"TEXT: /(.|\n)*/", *lines])


def _json(structure: Mapping[str, Any] | None) -> str:
    schema = {**(structure or {"type": "object"}), "x-guidance": {"whitespace_pattern": WHITESPACE}}
    return "%json " + json.dumps(schema)


def _vocabulary(tokenizer_json: str, size: int, eos: Sequence[int]) -> LLTokenizer:
    from llguidance import LLTokenizer

    return LLTokenizer(tokenizer_json, n_vocab=size, eos_token=list(eos))
