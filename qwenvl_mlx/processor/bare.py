"""A processor without a tokenizer, for checkpoints that come without one: ready prompts in, tokens out, no text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from qwenvl_mlx.errors import PromptError
from qwenvl_mlx.media import Media, Prompt
from qwenvl_mlx.processor.base import Box, GenerationDefaults, MediaOptions, Message, Processor

MISSING = "there is no tokenizer: give a Prompt of token ids, or load model and processor with load()"


class NoTokenizer:
    """Text can't go in; what comes out is empty."""

    def encode(self, text: str) -> NoReturn:
        raise PromptError(MISSING)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return ""

    def detokenizer(self, *, skip_special: bool = True) -> NoText:
        return NoText()

    def id(self, token: str) -> None:
        return None

    def to_json(self) -> NoReturn:
        raise PromptError(MISSING)


class NoText:
    """The streaming side of ``NoTokenizer``."""

    def add(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


class BareProcessor(Processor):
    """Stands in where the caller has only a model."""

    def __init__(self) -> None:
        self.tokenizer = NoTokenizer()
        self.defaults = GenerationDefaults()

    def __call__(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: MediaOptions | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> NoReturn:
        raise PromptError(MISSING)

    def raw(
        self,
        text: str,
        media: Sequence[Mapping[str, Any] | Media] = (),
        *,
        options: MediaOptions | None = None,
    ) -> NoReturn:
        raise PromptError(MISSING)

    def boxes(self, text: str, prompt: Prompt) -> list[Box]:
        return []
