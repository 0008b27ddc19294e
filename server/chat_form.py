"""How ``/v1/chat/completions`` words an answer: messages, deltas, tool calls, log-probabilities, boxes, usage."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from qwenvl_mlx import __version__
from qwenvl_mlx.engine.events import Reply, TextEvent, TokenLogprob
from qwenvl_mlx.processor.answer import Piece
from qwenvl_mlx.processor.base import Box
from qwenvl_mlx.server.answer import Call, Reader

FINGERPRINT = f"qwenvl-mlx-{__version__}"
LOWEST = -9999.0
"""Log-probability of what can't happen: JSON has no infinity."""

Spell = Callable[[int], str]


class ChatForm:
    """``legacy``: the caller uses ``functions``, not ``tools``; ``single``: at most one call is wanted."""

    def __init__(
        self,
        model: str,
        readers: list[Reader],
        spell: Spell,
        *,
        legacy: bool = False,
        single: bool = False,
    ) -> None:
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }
        self._choices = [_Choice(reader, legacy=legacy, single=single) for reader in readers]
        self._spell = spell

    def begin(self) -> list[dict[str, Any]]:
        return [self._chunk(i, {"role": "assistant", "content": ""}) for i in range(len(self._choices))]

    def text(self, choice: int, event: TextEvent) -> list[dict[str, Any]]:
        mine = self._choices[choice]
        deltas = mine.add(event.text, len(event.tokens))
        logprobs = [logprob_entry(entry, self._spell) for entry in event.logprobs]
        mine.logprobs += logprobs
        if logprobs and not deltas:
            deltas = [{}]
        return [
            self._chunk(choice, delta, logprobs=logprobs if i == 0 and logprobs else None)
            for i, delta in enumerate(deltas)
        ]

    def satisfied(self, choice: int) -> bool:
        return self._choices[choice].satisfied

    def end(self, choice: int, reply: Reply) -> list[dict[str, Any]]:
        mine = self._choices[choice]
        deltas = [] if mine.satisfied else mine.finish()
        last: dict[str, Any] = {"boxes": boxes} if (boxes := box_entries(reply.boxes)) else {}
        chunk = self._chunk(choice, last, finish_reason=mine.finish_reason(reply))
        return [*(self._chunk(choice, delta) for delta in deltas), chunk]

    def usage(self, replies: Mapping[int, Reply]) -> dict[str, Any]:
        return {**self._chunk(0, {}), "choices": [], **self._counts(replies)}

    def body(self, replies: Mapping[int, Reply]) -> dict[str, Any]:
        choices = [
            {
                "index": i,
                "message": choice.message(replies[i]),
                "logprobs": {"content": choice.logprobs, "refusal": None} if choice.logprobs else None,
                "finish_reason": choice.finish_reason(replies[i]),
            }
            for i, choice in enumerate(self._choices)
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, **self._counts(replies)}

    def _counts(self, replies: Mapping[int, Reply]) -> dict[str, Any]:
        usage = usage_entry(replies)
        reasoning = sum(choice.reasoning_tokens for choice in self._choices)
        usage["completion_tokens_details"] = {"reasoning_tokens": reasoning}
        return {"usage": usage, "timings": dataclasses.asdict(replies[0].timings)}

    def _chunk(
        self,
        choice: int,
        delta: dict[str, Any],
        *,
        logprobs: list[dict[str, Any]] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        entry = {
            "index": choice,
            "delta": delta,
            "logprobs": None if logprobs is None else {"content": logprobs, "refusal": None},
            "finish_reason": finish_reason,
        }
        return {**self._head, "object": "chat.completion.chunk", "choices": [entry]}


class _Choice:
    """What was said so far in one choice."""

    def __init__(self, reader: Reader, *, legacy: bool, single: bool) -> None:
        self.logprobs: list[dict[str, Any]] = []
        self.reasoning_tokens = 0
        self._reader = reader
        self._in_reasoning = False
        self._legacy = legacy
        self._single = single or legacy
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[dict[str, Any]] = []

    @property
    def satisfied(self) -> bool:
        return self._single and bool(self._calls)

    def add(self, text: str, tokens: int) -> list[dict[str, Any]]:
        found = self._reader.add(text)
        if found:
            self._in_reasoning = isinstance(found[-1], Piece) and found[-1].kind == "reasoning"
        self.reasoning_tokens += tokens if self._in_reasoning else 0
        return self._deltas(found)

    def finish(self) -> list[dict[str, Any]]:
        return self._deltas(self._reader.finish())

    def finish_reason(self, reply: Reply) -> str:
        if self._calls:
            return "function_call" if self._legacy else "tool_calls"
        return "stop" if reply.finish_reason == "cancelled" else reply.finish_reason

    def message(self, reply: Reply) -> dict[str, Any]:
        content = "".join(self._content)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content if content or not self._calls else None,
            "refusal": None,
        }
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._legacy:
            message["function_call"] = self._calls[0]["function"] if self._calls else None
        elif self._calls:
            message["tool_calls"] = self._calls
        if reply.boxes:
            message["boxes"] = box_entries(reply.boxes)
        return message

    def _deltas(self, found: list[Piece | Call]) -> list[dict[str, Any]]:
        return [delta for item in found if not self.satisfied for delta in self._entries(item)]

    def _entries(self, item: Piece | Call) -> list[dict[str, Any]]:
        if isinstance(item, Piece):
            reasoning = item.kind == "reasoning"
            (self._reasoning if reasoning else self._content).append(item.text)
            return [{"reasoning_content" if reasoning else "content": item.text}]
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
        place = len(self._calls)
        self._calls.append(call)
        if self._legacy:
            return [
                {"function_call": {**function, "arguments": ""}},
                {"function_call": {"arguments": function["arguments"]}},
            ]
        opened = {**call, "index": place, "function": {**function, "arguments": ""}}
        filled = {"index": place, "function": {"arguments": function["arguments"]}}
        return [{"tool_calls": [opened]}, {"tool_calls": [filled]}]


def usage_entry(replies: Mapping[int, Reply]) -> dict[str, Any]:
    """Tokens of the prompts (each counted once) and of all choices."""
    prompts = {tuple(reply.prompt_token_ids): reply.usage for reply in reversed(list(replies.values()))}
    prompt = sum(usage.prompt_tokens for usage in prompts.values())
    completion = sum(reply.usage.completion_tokens for reply in replies.values())
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in prompts.values())},
    }


def box_entries(boxes: list[Box]) -> list[dict[str, Any]]:
    """Places in pixels of the source pictures."""
    return [
        {"points": [list(point) for point in box.points], "label": box.label, "image": box.image}
        for box in boxes
    ]


def logprob_entry(entry: TokenLogprob, spell: Spell) -> dict[str, Any]:
    """One token with its alternatives, in the form of the chat endpoint."""
    top = [_spelled(token, value, spell) for token, value in entry.top]
    return {**_spelled(entry.token, entry.logprob, spell), "top_logprobs": top}


def _spelled(token: int, value: float, spell: Spell) -> dict[str, Any]:
    text = spell(token)
    # A token may be a part of a character: then no text says its bytes.
    whole = "\ufffd" not in text
    return {"token": text, "logprob": max(value, LOWEST), "bytes": list(text.encode()) if whole else None}
