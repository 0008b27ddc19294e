"""What a request gives back: pieces of text while it runs, and the whole reply at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from qwenvl_mlx.processor.base import Box

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log-probability of the chosen token under the model alone, and the likeliest tokens with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens read and written; ``cached_tokens`` of the prompt were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """Seconds. ``queue``: waited for its turn; ``ttft``: from the submission to the first token."""

    queue: float = 0.0
    vision: float = 0.0
    prefill: float = 0.0
    ttft: float = 0.0
    decode: float = 0.0
    prompt_tokens_per_second: float = 0.0
    tokens_per_second: float = 0.0


@dataclass(frozen=True)
class Reply:
    """A finished answer. ``tokens`` are all that the model made, the end-of-answer token included."""

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    boxes: list[Box] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_token_ids: list[int] = field(default_factory=list)
    picture_sizes: list[tuple[int, int]] = field(default_factory=list)
    """Width and height in which each picture or frame went through the vision tower."""


@dataclass(frozen=True)
class TextEvent:
    """A piece of text and the tokens that completed it."""

    text: str
    tokens: Sequence[int]
    logprobs: Sequence[TokenLogprob] = ()


@dataclass(frozen=True)
class FinishEvent:
    """The last event of a request."""

    reply: Reply


Event = TextEvent | FinishEvent
