"""What a caller may ask of one generation, and of the engine as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qwenvl_mlx.errors import GenerationError

LARGEST = 1e30
WHOLE = {
    "max_tokens": (1, LARGEST),
    "top_k": (-1, LARGEST),
    "logprobs": (0, 20),
    "seed": (-(2.0**63), 2.0**64),
}
NUMBERS = {
    "temperature": (0, LARGEST),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (1e-6, 1e6),  # 1 means none
    "presence_penalty": (-LARGEST, LARGEST),
    "frequency_penalty": (-LARGEST, LARGEST),
}


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
        """``GenerationError`` for what no answer could be made with: on the engine's thread it would harm others."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(text, str) for text in stop):
            raise GenerationError("stop must be a text or a list of texts")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        for name, (low, high) in WHOLE.items():
            _within(name, getattr(self, name), low, high, kind=Integral)
        for name, (low, high) in NUMBERS.items():
            _within(name, getattr(self, name), low, high, kind=Real)
        if not isinstance(self.ignore_eos, bool):
            raise GenerationError("ignore_eos must be true or false")


@dataclass(frozen=True)
class EngineOptions:
    """Options of the engine.

    ``prefill_chunk``: most tokens of a prompt that are run at once; fewer while answers run, see ``pace``.
    ``max_batch``: requests decoded together.
    ``max_queue``: requests that may wait. ``cache_bytes``: budget of the prefix cache (None: from the memory).
    ``max_kv_size``: tokens that a sequence may keep. ``kv_bits``: quantise the KV cache to 4 or 8 bits.
    ``prompt_lookup``: guess tokens of greedy answers from the prompt, see ``lookup``; the answer stays the same.
    """

    prefill_chunk: int = 768
    max_batch: int = 8
    max_queue: int = 64
    cache_bytes: int | None = None
    max_kv_size: int | None = None
    kv_bits: int | None = None
    prompt_lookup: bool = True


def _within(name: str, value: Any, low: float, high: float, *, kind: type) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, kind):
        what = "a whole number" if kind is Integral else "a number"
        raise GenerationError(f"{name} must be {what}, not {value!r}")
    number = float(value)  # type: ignore[arg-type]
    if not low <= number <= high:
        limits = f"at least {low:g}" if high == LARGEST else f"between {low:g} and {high:g}"
        raise GenerationError(f"{name} must be {limits}, not {value}")


def _bias(given: Mapping[Any, Any]) -> dict[int, float]:
    """``logit_bias`` with numbers for token ids, which JSON has as texts."""
    try:
        bias = {int(token): float(value) for token, value in given.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise GenerationError(f"logit_bias must name a number for each token id ({error})") from error
    if not all(map(math.isfinite, bias.values())):
        raise GenerationError("logit_bias must be finite: -100 forbids a token, 100 demands it")
    return bias
