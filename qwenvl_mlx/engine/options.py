"""What a caller may ask of one generation, and of the engine as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qwenvl_mlx.errors import GenerationError


class Guide(Protocol):
    """Keeps one answer to a grammar."""

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next: ``[vocab]``, at least one of them."""

    def accept(self, token: int) -> None:
        """Take note of the token that was chosen."""


@dataclass(frozen=True)
class GenerationOptions:
    """Options of one request. None: as the checkpoint's ``generation_config.json`` says, else off.

    ``temperature`` 0 is greedy. ``stop``: texts that end the answer and are not part of it. ``logprobs``: return the
    log-probability of each token and of that many alternatives. ``constraint``: makes the guide of an answer that
    must follow a grammar.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    constraint: Callable[[], Guide] | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        _within("max_tokens", self.max_tokens, 1, None)
        _within("temperature", self.temperature, 0, None)
        _within("top_p", self.top_p, 0, 1)
        _within("top_k", self.top_k, -1, None)
        _within("min_p", self.min_p, 0, 1)
        _within("logprobs", self.logprobs, 0, 20)
        if self.repetition_penalty is not None and self.repetition_penalty <= 0:
            raise GenerationError("repetition_penalty must be above 0 (1 means none)")


@dataclass(frozen=True)
class EngineOptions:
    """Options of the engine.

    ``prefill_chunk``: most tokens of a prompt that are run at once; fewer while answers run, see ``pace``.
    ``max_batch``: requests decoded together.
    ``max_queue``: requests that may wait. ``cache_bytes``: budget of the prefix cache (None: from the memory).
    ``max_kv_size``: tokens that a sequence may keep. ``kv_bits``: quantise the KV cache to 4 or 8 bits.
    ``prompt_lookup``: guess tokens of greedy answers from the prompt, see ``lookup``; the answer stays the same.
    """

    prefill_chunk: int = 512
    max_batch: int = 8
    max_queue: int = 64
    cache_bytes: int | None = None
    max_kv_size: int | None = None
    kv_bits: int | None = None
    prompt_lookup: bool = True


def _within(name: str, value: float | None, low: float, high: float | None) -> None:
    if value is not None and (value < low or (high is not None and value > high)):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise GenerationError(f"{name} must be {limits}, not {value}")
