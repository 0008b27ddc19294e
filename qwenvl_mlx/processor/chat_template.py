"""Render the checkpoint's own chat template, in a sandbox, with what transformers offers to templates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qwenvl_mlx.config import read_json
from qwenvl_mlx.errors import CheckpointError, PromptError

# What a template raises itself, and what its expressions raise on messages that it did not expect.
_REFUSALS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class ChatTemplate:
    """Named templates of one checkpoint; ``tokens``: the variables such as ``eos_token`` that they may use."""

    def __init__(self, sources: Mapping[str, str], tokens: Mapping[str, str] | None = None) -> None:
        self._sources = dict(sources)
        self._tokens = dict(tokens or {})
        environment = _environment()
        try:
            self._compiled = {name: environment.from_string(source) for name, source in sources.items()}
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"the chat template is damaged ({error}): fetch it again") from error

    @classmethod
    def from_folder(cls, folder: Path) -> ChatTemplate:
        """From ``chat_template.jinja``, ``chat_template.json`` or ``tokenizer_config.json``; none is no error yet."""
        path = folder / "tokenizer_config.json"
        config = read_json(path) if path.is_file() else {}
        found = _sources(folder, config.get("chat_template"))
        return cls(found, {name: _content(config[name]) for name in NAMED_TOKENS if config.get(name)})

    def takes_argument_text(self, *, tools: bool) -> bool:
        """Whether the template itself tells a tool call's arguments in JSON text from those in a mapping."""
        return bool(self._sources) and "arguments is string" in self._sources[self._choose(tools=tools)]

    def mentions(self, text: str) -> bool:
        """Whether a template writes ``text``: so the forms of calls are told apart."""
        return any(text in source for source in self._sources.values())

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        **variables: Any,
    ) -> str:
        """The prompt's text, the assistant's turn opened unless ``variables`` say ``add_generation_prompt=False``.

        Raises ``PromptError`` where there is no template, or where it refuses the messages.
        """
        if not self._sources:
            raise PromptError(
                "the checkpoint has no chat template: put chat_template.jinja into its folder, or send a raw prompt"
            )
        template = self._compiled[self._choose(tools=bool(tools))]
        values = {
            "add_generation_prompt": True,
            **self._tokens,
            **variables,
            "messages": messages,
            "tools": tools,
        }
        try:
            return template.render(values)
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
        ) as error:
            raise PromptError(f"the chat template refuses these messages: {error}") from error

    def _choose(self, *, tools: bool) -> str:
        if tools and "tool_use" in self._sources:
            return "tool_use"
        return "default" if "default" in self._sources else next(iter(self._sources))


def _sources(folder: Path, inline: Any) -> dict[str, str]:
    """Templates by name; the file comes before the configuration."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return {"default": path.read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} can't be read ({error}): fetch it again") from error
    path = folder / "chat_template.json"
    found = read_json(path).get("chat_template") if path.is_file() else inline
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list):
        return {item["name"]: item["template"] for item in found}
    return dict(found) if isinstance(found, Mapping) else {}


def _content(token: Any) -> str:
    """A special token of ``tokenizer_config.json``: a string, or a mapping with its content."""
    return str(token["content"] if isinstance(token, Mapping) else token)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what the assistant wrote, for training; here its content is passed on."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own filter: no HTML escapes, keys in their order."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
