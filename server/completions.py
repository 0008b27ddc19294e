"""POST /v1/completions: texts or token ids as they stand, without the chat template."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from starlette.responses import Response

from qwenvl_mlx.media import Prompt
from qwenvl_mlx.processor.base import MediaOptions
from qwenvl_mlx.server import media, schema
from qwenvl_mlx.server.completion_form import CompletionForm
from qwenvl_mlx.server.errors import ApiError
from qwenvl_mlx.server.options import options_of
from qwenvl_mlx.server.respond import Conversation
from qwenvl_mlx.server.run import Run
from qwenvl_mlx.server.shelf import Served
from qwenvl_mlx.server.speller import Speller
from qwenvl_mlx.server.state import State

DEFAULT_TOKENS = 16
"""OpenAI's default of ``max_tokens`` for this endpoint."""

PICTURE = "<img>"
"""What begins a picture's address in a text for the original Qwen-VL."""


async def answer(body: schema.CompletionRequest, state: State) -> Response:
    """Each prompt gives ``n`` choices, in order."""
    limits = state.settings.limits
    deadline = asyncio.get_running_loop().time() + limits.request_seconds
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    if body.echo and body.logprobs is not None:
        raise ApiError(400, "logprobs of the prompt are not computed: leave out echo", param="echo")
    async with AsyncExitStack() as stack:
        served = await stack.enter_async_context(state.shelf.lease(body.model))
        prompts = await state.in_thread(_prompts, body, served, state)
        options = options_of(
            body,
            limits,
            max_tokens=body.max_tokens or DEFAULT_TOKENS,
            logprobs=body.logprobs,
            vocab=served.engine.model.vocab_size,
        )
        if len(prompts) * len(options) > limits.choices:
            raise ApiError(400, f"prompts times n must be at most {limits.choices}", param="n")
        each = [(prompt, one) for prompt in prompts for one in options]
        run = Run(served.engine, [prompt for prompt, _ in each], [one for _, one in each], deadline=deadline)
        form = CompletionForm(
            body.model,
            [_echo(prompt, served) if body.echo else "" for prompt, _ in each],
            Speller(served.engine.processor.tokenizer),
        )
        talk = Conversation(run, form, stack.pop_all(), state)
    if not body.stream:
        return await talk.whole()
    return await talk.streamed(include_usage=bool(body.stream_options and body.stream_options.include_usage))


def _prompts(body: schema.CompletionRequest, served: Served, state: State) -> list[Prompt]:
    return [_prompt(one, served, state) for one in _each(body.prompt)]


def _each(given: str | list[str] | list[int] | list[list[int]]) -> list[str] | list[list[int]]:
    """A single prompt as a list of one."""
    if isinstance(given, str):
        return [given]
    ids = [one for one in given if isinstance(one, int)]
    texts = [one for one in given if isinstance(one, str)]
    return [ids] if ids else texts or [one for one in given if isinstance(one, list)]


def _prompt(given: str | list[int], served: Served, state: State) -> Prompt:
    if isinstance(given, str):
        context = served.engine.model.context_length
        media.check_length(len(given), state.settings, context=context, param="prompt")
        if served.engine.processor.tokenizer.id(PICTURE) is not None:  # else it is nothing but text
            media.check_pictures(given.count(PICTURE), state.settings, param="prompt")
        return served.engine.processor.raw(given, options=MediaOptions(policy=state.policy))
    vocab = served.engine.model.vocab_size
    if max(given) >= vocab:
        raise ApiError(
            400, f"prompt names the token {max(given)}: ids from 0 to {vocab - 1} are known", param="prompt"
        )
    return Prompt(given)


def _echo(prompt: Prompt, served: Served) -> str:
    reader = served.engine.processor.tokenizer.detokenizer(skip_special=False)
    return "".join(map(reader.add, prompt.input_ids)) + reader.finish()
