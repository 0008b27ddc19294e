"""What every processor offers: a conversation in, a Prompt out; and tokens back to text and boxes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from qwenvl_mlx.errors import PromptError
from qwenvl_mlx.media import Media, Prompt
from qwenvl_mlx.processor.policy import FetchPolicy

Message = Mapping[str, Any]


@dataclass(frozen=True)
class MediaOptions:
    """How pictures and videos are cut, where a request says so. None: as the checkpoint's own files say.

    ``min_pixels``, ``max_pixels``: area of a picture (or of all frames of a video, where the generation counts so)
    after resizing; ``fps``: frames a second taken from a video file; ``max_frames``: at most so many of them.
    ``policy``: from where media may be fetched.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    policy: FetchPolicy = field(default_factory=FetchPolicy)


@dataclass(frozen=True)
class Box:
    """A place in a source picture. ``points``: pixels (x, y), two corners of a box or the four of a quad."""

    points: tuple[tuple[int, int], ...]
    label: str | None = None
    image: int = 0
    """Index of the picture among the prompt's images."""


class Detokenizer(Protocol):
    """Turns a growing list of tokens into text, never half a character."""

    def add(self, token: int) -> str:
        """The text that this token completes (may be empty)."""

    def finish(self) -> str:
        """What was held back."""


class Tokenizer(Protocol):
    """Text to ids and back."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which special tokens are recognised."""

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ids."""

    def detokenizer(self, *, skip_special: bool = True) -> Detokenizer:
        """A streaming decoder for one answer. Tags that mark places (<ref>, <box> …) are kept either way."""

    def id(self, token: str) -> int | None:
        """Id of a special token, or None."""

    def to_json(self) -> str:
        """The content of a ``tokenizer.json``: what libraries for grammars read."""


@dataclass(frozen=True)
class GenerationDefaults:
    """What the checkpoint's ``generation_config.json`` says; None where it is silent."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    eos_token_ids: frozenset[int] = field(default_factory=frozenset)


ToolFormat = Literal["json", "xml", "react"]
"""How a generation writes calls of functions: JSON or XML in ``<tool_call>``, or as ReAct text."""


class Processor(ABC):
    """Made by ``load_processor(folder)``; holds a tokenizer and settings, no request's state."""

    tokenizer: Tokenizer
    defaults: GenerationDefaults
    tool_format: ToolFormat = "json"

    @property
    def max_pixels(self) -> int | None:
        """The area that pictures are reduced to where a request says nothing; None where all get one size."""
        return None

    @property
    def max_frames(self) -> int | None:
        """How many frames of a video file are taken at most where a request says nothing; None without videos."""
        return None

    def knows(self, variable: str) -> bool:
        """Whether the chat template asks for a variable, such as "enable_thinking"."""
        return False

    @abstractmethod
    def __call__(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: MediaOptions | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """OpenAI-style messages -> Prompt, with the turn of the assistant opened.

        ``tools``: OpenAI's function descriptions. ``template``: further variables of the chat template, such as
        ``{"enable_thinking": False}`` or ``{"add_vision_id": True}``. Raises ``PromptError``, ``MediaError``.
        """

    @abstractmethod
    def raw(
        self,
        text: str,
        media: Sequence[Mapping[str, Any] | Media] = (),
        *,
        options: MediaOptions | None = None,
    ) -> Prompt:
        """A text with special tokens and placeholders as it stands; ``media`` in the order of the placeholders."""

    def continuation(self, part: Mapping[str, Any], *, options: MediaOptions | None = None) -> Prompt:
        """A message part of an answer that the model is to continue; ``PromptError`` where it must be text."""
        if part["type"] != "text":
            raise PromptError(f"an answer that is to be continued can't hold a {part['type']}: send text")
        return Prompt(self.tokenizer.encode(part["text"]))

    @abstractmethod
    def boxes(self, text: str, prompt: Prompt) -> list[Box]:
        """The places that an answer names, in pixels of the source pictures."""
