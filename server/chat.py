"""POST /v1/chat/completions: messages in, an answer out."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

from starlette.responses import Response

from qwenvl_mlx.engine.options import GenerationOptions
from qwenvl_mlx.media import Prompt
from qwenvl_mlx.processor.answer import END_THINK, THINK
from qwenvl_mlx.processor.base import MediaOptions, Processor
from qwenvl_mlx.server import grammar, media, messages, schema, tools
from qwenvl_mlx.server.chat_form import ChatForm
from qwenvl_mlx.server.errors import ApiError
from qwenvl_mlx.server.options import longest, options_of
from qwenvl_mlx.server.respond import Conversation
from qwenvl_mlx.server.run import Run
from qwenvl_mlx.server.shelf import Served
from qwenvl_mlx.server.speller import Speller
from qwenvl_mlx.server.state import State

TAIL = 12
"""Tokens at the end of a prompt that are read to see whether it opens the reasoning."""


@dataclass(frozen=True)
class Prepared:
    """A request that is ready for the engine. ``thinking``: the answer begins inside the reasoning."""

    prompt: Prompt
    thinking: bool


async def answer(body: schema.ChatRequest, state: State) -> Response:
    """Prepare, submit, and wait or stream. What fails on the way gives back the model."""
    deadline = asyncio.get_running_loop().time() + state.settings.limits.request_seconds
    async with AsyncExitStack() as stack:
        served = await stack.enter_async_context(state.shelf.lease(body.model))
        wish = tools.wish_of(body)
        plan = tools.plan(wish, served.engine.processor.tool_format)
        prepared = await state.in_thread(prepare, body, plan, served, state)
        options = await state.in_thread(_options, body, plan, wish, prepared, served, state)
        run = Run(served.engine, [prepared.prompt] * len(options), options, deadline=deadline)
        form = ChatForm(
            body.model,
            [plan.reader(thinking=prepared.thinking) for _ in options],
            Speller(served.engine.processor.tokenizer),
            legacy=wish.legacy,
            single=wish.single,
        )
        talk = Conversation(run, form, stack.pop_all(), state)
    if not body.stream:
        return await talk.whole()
    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    return await talk.streamed(include_usage=include_usage)


def prepare(body: schema.ChatRequest, plan: tools.Plan, served: Served, state: State) -> Prepared:
    """Fetch and cut the pictures, make the prompt: slow work for a thread. Raises ``PromptError``, ``ApiError``."""
    processor = served.engine.processor
    frames = min(state.settings.limits.frames, processor.max_frames or 1)
    sizes = MediaOptions(body.min_pixels, body.max_pixels, body.fps, max_frames=frames, policy=state.policy)
    turns, continued = messages.convert(body.messages, low_pixels=_low_pixels(body, processor))
    media.check_counts(turns, state.settings, context=served.engine.model.context_length)
    if continued is not None and plan.form == "react":  # it writes such turns itself
        turns, continued = [*turns, {"role": "assistant", "content": continued}], None
    begun = (continued or "") + plan.begun
    _check_sizes(body, processor)
    template = _template(body, begun=bool(begun))
    prompt = processor(turns, tools=plan.tools, options=sizes, template=template)
    thinking = _opens_reasoning(prompt, processor)
    _check_template(body, processor, thinking=thinking)
    if begun:
        begun = f"\n{END_THINK}\n\n{begun}" if thinking else begun
        more = processor.continuation({"type": "text", "text": begun}, options=sizes)
        prompt = Prompt([*prompt.input_ids, *more.input_ids], prompt.media)
    return Prepared(prompt, thinking and not begun)


def _low_pixels(body: schema.ChatRequest, processor: Processor) -> int:
    """What low detail means here: never more than without it."""
    usual = body.max_pixels or processor.max_pixels or messages.LOW_DETAIL_PIXELS
    return min(messages.LOW_DETAIL_PIXELS, usual)


def _check_sizes(body: schema.ChatRequest, processor: Processor) -> None:
    """Where all pictures get one size, no other one can be asked for."""
    if processor.max_pixels is not None:
        return
    parts = [part for message in body.messages for part in messages.media_of(message)]
    for name in ("min_pixels", "max_pixels"):
        if any(getattr(given, name) is not None for given in (body, *parts)):
            raise ApiError(400, f"{name} is not possible: this model sees pictures at one size", param=name)


def _check_template(body: schema.ChatRequest, processor: Processor, *, thinking: bool) -> None:
    """What the template does not know must be so already."""
    wanted = _variables(body)
    if wanted.get("add_vision_id") and not processor.knows("add_vision_id"):
        raise ApiError(400, "this model's template can't number pictures", param="chat_template_kwargs")
    think = wanted.get("enable_thinking", thinking)
    if think != thinking and not processor.knows("enable_thinking"):
        raise ApiError(
            400, f"this model {'always thinks' if thinking else 'does not think'}", param="enable_thinking"
        )


def _template(body: schema.ChatRequest, *, begun: bool) -> dict[str, Any] | None:
    """Variables of the chat template; an answer that is begun for the model can't think first."""
    variables = _variables(body)
    if begun:
        variables["enable_thinking"] = False
    return variables or None


def _variables(body: schema.ChatRequest) -> dict[str, Any]:
    """What the request says about the template, wherever it says it."""
    given = body.chat_template_kwargs
    variables = given.model_dump(exclude_none=True) if given else {}
    thinking = body.enable_thinking
    if body.reasoning_effort is not None:
        thinking = body.reasoning_effort != "none"
    if thinking is not None:
        if variables.get("enable_thinking", thinking) != thinking:
            raise ApiError(400, "the fields about thinking contradict each other", param="enable_thinking")
        variables["enable_thinking"] = thinking
    return variables


def _opens_reasoning(prompt: Prompt, processor: Processor) -> bool:
    tail = processor.tokenizer.detokenizer(skip_special=False)
    text = "".join(map(tail.add, prompt.input_ids[-TAIL:])) + tail.finish()
    return text.rstrip().endswith(THINK)


def _options(
    body: schema.ChatRequest,
    plan: tools.Plan,
    wish: tools.Wish,
    prepared: Prepared,
    served: Served,
    state: State,
) -> list[GenerationOptions]:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    options = options_of(
        body,
        state.settings.limits,
        max_tokens=longest(body, len(prepared.prompt)),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        vocab=served.engine.model.vocab_size,
    )
    options = [replace(one, stop=(*one.stop, *plan.stops)) for one in options]
    constraint = grammar.for_chat(body, wish, served.grammars, thinking=prepared.thinking)
    return options if constraint is None else [replace(one, constraint=constraint) for one in options]
