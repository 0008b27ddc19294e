"""A request's sampling fields -> the engine's options."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from qwenvl_mlx.engine.options import GenerationOptions
from qwenvl_mlx.server import schema
from qwenvl_mlx.server.errors import ApiError
from qwenvl_mlx.server.settings import Limits

log = logging.getLogger(__name__)


def options_of(
    body: schema.Generation, limits: Limits, *, max_tokens: int | None, logprobs: int | None, vocab: int
) -> list[GenerationOptions]:
    """One for each choice: equal but for the seed, which counts up from the request's."""
    if body.user or body.safety_identifier:
        log.debug("a request of user %r", body.user or body.safety_identifier)
    options = GenerationOptions(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=_bias(body.logit_bias or {}, vocab),
        stop=_stops(body.stop, limits),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
    )
    choices = body.n or 1
    if choices > limits.choices:
        raise ApiError(400, f"n must be at most {limits.choices}, not {choices}", param="n")
    if body.seed is None:
        return [options] * choices
    return [replace(options, seed=(body.seed + choice) % 2**63) for choice in range(choices)]


def _stops(stop: str | list[str] | None, limits: Limits) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > limits.stops:
        raise ApiError(400, f"stop has {len(stops)} texts: at most {limits.stops} are taken", param="stop")
    if any(not text or len(text) > 1000 for text in stops):
        raise ApiError(400, "a stop text must have 1 to 1000 characters", param="stop")
    return stops


def _bias(given: Mapping[str, float], vocab: int) -> dict[int, float]:
    bias = {}
    for token, value in given.items():
        if not token.isascii() or not token.isdigit() or int(token[:12]) >= vocab:
            raise ApiError(
                400,
                f"logit_bias names the token {token[:20]!r}: ids from 0 to {vocab - 1} are known",
                param="logit_bias",
            )
        bias[int(token)] = value
    return bias


def longest(body: schema.ChatRequest, prompt_tokens: int) -> int | None:
    """The request's limit on the answer: the smallest of the fields that set one."""
    if (
        None not in (body.max_tokens, body.max_completion_tokens)
        and body.max_tokens != body.max_completion_tokens
    ):
        raise ApiError(
            400,
            "max_tokens and max_completion_tokens differ: send one of them",
            param="max_completion_tokens",
        )
    limits = [body.max_tokens, body.max_completion_tokens]
    if body.max_length is not None:
        if body.max_length <= prompt_tokens:
            raise ApiError(
                400,
                f"max_length is {body.max_length}, but the prompt alone has {prompt_tokens} tokens",
                param="max_length",
                code="context_length_exceeded",
            )
        limits.append(body.max_length - prompt_tokens)
    return min((limit for limit in limits if limit is not None), default=None)
