"""A small deterministic model and processor: the engine's counterpart in its own tests.

The decoder has what the engine must respect: rotary positions with a delta, causal attention over mlx-lm's caches
(left-padded in a batch), optionally a recurrent layer whose state can't be trimmed, and media that fill placeholders.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qwenvl_mlx.engine import Engine, GenerationOptions
from qwenvl_mlx.errors import MediaError, PromptError
from qwenvl_mlx.layers.cache import Cache, kv
from qwenvl_mlx.layers.mlx_lm import leaf
from qwenvl_mlx.layers.stages import Stages
from qwenvl_mlx.media import Embedded, Features, Media, Prompt
from qwenvl_mlx.models.base import Places, VisionLanguageModel
from qwenvl_mlx.processor.base import Box, GenerationDefaults, MediaOptions, Message, Processor

base = leaf("models.base")

PICTURE, START, END = 256, 257, 258
VOCAB = 260
PATCH = 12  # numbers in one patch; each patch is one token


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def __call__(self, x: mx.array, cache: Any) -> mx.array:
        B, L, D = x.shape
        q, k, v = (
            part.reshape(B, L, self.heads, self.size).swapaxes(1, 2) for part in mx.split(self.qkv(x), 3, -1)
        )
        mask = (
            cache.make_mask(L, return_array=True, window_size=None)
            if cache is not None
            else base.create_causal_mask(L)
        )
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        x = base.scaled_dot_product_attention(q, k, v, cache, scale=self.size**-0.5, mask=mask)
        return self.out(x.swapaxes(1, 2).reshape(B, L, D))


class Recurrence(nn.Module):
    """A decaying sum: a state that can be carried on but not taken back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, width, bias=False)

    def __call__(self, x: mx.array, cache: Any) -> mx.array:
        state = cache[0] if cache is not None and cache[0] is not None else mx.zeros((x.shape[0], x.shape[2]))
        states = []
        for step in range(x.shape[1]):
            state = 0.8 * state + x[:, step]
            states.append(state)
        if cache is not None:
            cache[0] = state
        return self.out(mx.stack(states, axis=1))


class FakeModel(VisionLanguageModel):
    def __init__(self, *, hybrid: bool = False, context: int = 512, width: int = 64, seed: int = 0) -> None:
        super().__init__({})
        mx.random.seed(seed)
        self.vocab_size = VOCAB
        self._hybrid, self._context = hybrid, context
        self.encoded: list[str] = []
        self.pauses = 0
        self.patch = nn.Linear(PATCH, width)
        self.embedding = nn.Embedding(VOCAB, width)
        self.attention = [Attention(width, 2) for _ in range(2)]
        self.recurrence = Recurrence(width)
        self.head = nn.Linear(width, VOCAB, bias=False)
        self.head.weight = 3.0 * self.head.weight
        mx.eval(self.parameters())

    @classmethod
    def sanitize(cls, weights: dict[str, mx.array], config: Mapping[str, Any]) -> dict[str, mx.array]:
        return weights

    def encode(self, media: Sequence[Media]) -> list[Features]:
        if any(item.kind == "video" for item in media):
            raise MediaError("this model takes no videos")
        self.encoded += [item.digest for item in media]
        return [Features(3.0 * self.patch(mx.array(item.patches))) for item in media]

    def encode_stages(self, media: Media) -> Stages[Features]:
        for _ in range(self.pauses):
            yield mx.zeros((1,))
        return self.encode([media])[0]

    def media_places(self, input_ids: Sequence[int], media: Sequence[Media]) -> list[Places]:
        places = np.flatnonzero(np.array(input_ids) == PICTURE)
        sizes = [len(item.patches) for item in media]
        if len(places) != sum(sizes):
            raise PromptError("placeholders and media differ")
        return np.split(places, np.cumsum(sizes)[:-1]) if sizes else []

    def embed(
        self, input_ids: Sequence[int], features: Sequence[Features | None], media: Sequence[Media]
    ) -> Embedded:
        ids = np.array(input_ids)
        places = np.concatenate([*self.media_places(input_ids, media), np.zeros(0, int)])
        hidden = self.embedding(self.token_array(input_ids))
        if len(places):
            rows = [
                item.embeddings if item is not None else mx.zeros((len(one.patches), hidden.shape[-1]))
                for item, one in zip(features, media, strict=True)
            ]
            hidden[mx.array(places)] = mx.concatenate(rows)
        # Each picture counts as three positions less than it has tokens, so that the delta is not zero.
        positions = np.arange(len(ids)) - 3 * np.cumsum(ids == START)
        delta = -3 * int((ids == START).sum())
        return Embedded(
            hidden[None], mx.array(np.stack([positions] * 3), mx.int32), delta, (), 0, len(input_ids)
        )

    def __call__(
        self, embedded: Embedded, cache: Cache | None = None, *, last_only: bool = False
    ) -> mx.array:
        if cache is not None:
            cache.rope_delta = mx.array([embedded.rope_delta], mx.int32)
        return self._layers(embedded.embeddings, embedded.positions[0], cache, last_only=last_only)

    def decode(self, tokens: mx.array, cache: Cache, *, last_only: bool = False) -> mx.array:
        B, L = tokens.shape
        first = mx.broadcast_to(mx.array(cache.next_position).reshape(-1, 1), (B, 1))
        return self._layers(self.embedding(tokens), first + mx.arange(L), cache, last_only=last_only)

    def _layers(
        self, x: mx.array, positions: mx.array, cache: Cache | None, *, last_only: bool = False
    ) -> mx.array:
        angles = positions.astype(mx.float32)[..., None] * mx.exp(-0.1 * mx.arange(x.shape[-1]))
        x = x + 0.5 * mx.sin(angles)
        layers = list(cache) if cache is not None else [None] * (2 + self._hybrid)
        if self._hybrid:
            x = x + self.recurrence(x, layers.pop(0))
        for layer, state in zip(self.attention, layers, strict=True):
            x = x + layer(x, state)
        x = nn.gelu(x)  # compiled: see the test of a clean exit
        return self.head(x[:, -1:] if last_only else x)

    def make_cache(self) -> Cache:
        recurrent = [kv.ArraysCache(1)] if self._hybrid else []
        return Cache([*recurrent, kv.KVCache(), kv.KVCache()])

    @property
    def context_length(self) -> int:
        return self._context


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return bytes(token for token in ids if token < 256).decode(errors="replace")

    def detokenizer(self, *, skip_special: bool = True) -> BytesDetokenizer:
        return BytesDetokenizer()

    def id(self, token: str) -> int | None:
        return {"<picture>": PICTURE, "<|im_start|>": START, "<|im_end|>": END}.get(token)


class BytesDetokenizer:
    def __init__(self) -> None:
        self._held = b""

    def add(self, token: int) -> str:
        self._held += bytes([token]) if token < 256 else b""
        try:
            text = self._held.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return ""
            text = self._held.decode(errors="replace")
        self._held = b""
        return text

    def finish(self) -> str:
        text, self._held = self._held.decode(errors="replace"), b""
        return text


class FakeProcessor(Processor):
    def __init__(self, defaults: GenerationDefaults | None = None) -> None:
        self.tokenizer = Bytes()
        self.defaults = defaults or GenerationDefaults(eos_token_ids=frozenset({END}))

    def __call__(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: MediaOptions | None = None,
        template: Mapping[str, Any] | None = None,
    ) -> Prompt:
        ids: list[int] = []
        media: list[Media] = []
        for message in messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            ids += self.tokenizer.encode(message["role"][0] + ":")
            for part in parts:
                if part["type"] == "image":
                    media.append(part["image"])
                    ids += [START] + [PICTURE] * len(media[-1].patches)
                else:
                    ids += self.tokenizer.encode(part["text"])
            ids.append(END)
        return Prompt([*ids, *self.tokenizer.encode("a:")], media)

    def raw(
        self,
        text: str,
        media: Sequence[Mapping[str, Any] | Media] = (),
        *,
        options: MediaOptions | None = None,
    ) -> Prompt:
        return Prompt(self.tokenizer.encode(text), [item for item in media if isinstance(item, Media)])

    def boxes(self, text: str, prompt: Prompt) -> list[Box]:
        return []


def picture(seed: int = 0, patches: int = 6, *, kind: str = "image") -> Media:
    """A picture of random patches; each patch is one token. Videos make the model fail."""
    rows = np.random.default_rng(seed).standard_normal((patches, PATCH)).astype(np.float32)
    return Media(kind, rows, (1, 1, patches))


def ask(text: str, *pictures: Media) -> list[Message]:
    """One user's turn with pictures before the text."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": item} for item in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def hold(engine: Engine) -> threading.Event:
    """Stop the engine's thread until the event is set: whatever is submitted meanwhile waits together."""
    began, held = threading.Event(), threading.Event()

    def listen(_: object) -> None:
        began.set()
        held.wait()

    engine.submit("hold", GenerationOptions(max_tokens=1), listener=listen)
    began.wait()
    return held


def greedy(model: FakeModel, prompt: Prompt, count: int) -> list[int]:
    """The plainest loop: the whole sequence anew for every token."""
    ids = list(prompt.input_ids)
    features = model.encode(prompt.media)
    embedded = model.embed(ids, features, prompt.media)
    cache = model.make_cache()
    logits = model(embedded, cache)
    tokens = []
    for _ in range(count):
        tokens.append(int(mx.argmax(logits[0, -1])))
        logits = model.decode(mx.array([[tokens[-1]]]), cache)
    return tokens
