"""How ``/v1/completions`` words an answer."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from qwenvl_mlx.engine.events import Reply, TextEvent, TokenLogprob
from qwenvl_mlx.server.chat_form import FINGERPRINT, LOWEST, Spell, usage_entry


class CompletionForm:
    """``echoes``: for each choice what its text begins with."""

    def __init__(self, model: str, echoes: Sequence[str], spell: Spell) -> None:
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }
        self._echoes = echoes
        self._offsets = [len(echo) for echo in echoes]
        self._spell = spell

    def begin(self) -> list[dict[str, Any]]:
        return [self._chunk(i, echo) for i, echo in enumerate(self._echoes) if echo]

    def text(self, choice: int, event: TextEvent) -> list[dict[str, Any]]:
        logprobs = self._logprobs(event.logprobs, self._offsets[choice]) if event.logprobs else None
        self._offsets[choice] += len(event.text)
        return [self._chunk(choice, event.text, logprobs=logprobs)]

    def satisfied(self, choice: int) -> bool:
        return False

    def end(self, choice: int, reply: Reply) -> list[dict[str, Any]]:
        return [self._chunk(choice, "", finish_reason=reply.finish_reason)]

    def usage(self, replies: Mapping[int, Reply]) -> dict[str, Any]:
        return {**self._head, "choices": [], **self._counts(replies)}

    def body(self, replies: Mapping[int, Reply]) -> dict[str, Any]:
        choices = [
            {
                "index": i,
                "text": echo + replies[i].text,
                "logprobs": self._logprobs(replies[i].logprobs, len(echo)) if replies[i].logprobs else None,
                "finish_reason": replies[i].finish_reason,
            }
            for i, echo in enumerate(self._echoes)
        ]
        return {**self._head, "choices": choices, **self._counts(replies)}

    def _counts(self, replies: Mapping[int, Reply]) -> dict[str, Any]:
        return {"usage": usage_entry(replies), "timings": dataclasses.asdict(replies[0].timings)}

    def _chunk(
        self,
        choice: int,
        text: str,
        *,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        entry = {"index": choice, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head, "choices": [entry]}

    def _logprobs(self, entries: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
        tokens = [self._spell(entry.token) for entry in entries]
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [max(entry.logprob, LOWEST) for entry in entries],
            "top_logprobs": [
                {self._spell(token): max(value, LOWEST) for token, value in entry.top} for entry in entries
            ],
            "text_offset": offsets,
        }
