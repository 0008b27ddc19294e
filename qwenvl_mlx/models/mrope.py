"""What Qwen2-VL and all later generations share: media in the places of placeholders, and M-RoPE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qwenvl_mlx.errors import ConfigError
from qwenvl_mlx.layers.cache import Cache
from qwenvl_mlx.layers.decoder import Decoder, DecoderConfig
from qwenvl_mlx.layers.rotary import MRope
from qwenvl_mlx.layers.spans import Placeholders
from qwenvl_mlx.layers.stages import Stages
from qwenvl_mlx.media import Embedded, Features, Media
from qwenvl_mlx.models.base import Places, VisionLanguageModel


def text_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The decoder's keys: nested under ``text_config``, or flat beside ``vision_config``."""
    text: Mapping[str, Any] = config.get("text_config") or config
    if "num_local_experts" in text:  # how transformers 5 writes it
        return {"num_experts": text["num_local_experts"], **text}
    return text


def vision_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The vision tower's keys, with ``in_chans`` under its later name."""
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        raise ConfigError("config.json lacks vision_config: is this a vision-language checkpoint?")
    return {"in_channels": vision.get("in_chans", 3), **vision}


def tied(config: Mapping[str, Any], *, nested: bool = False) -> bool:
    """Whether the output layer is the token embedding. The top level decides where it has the key.

    ``nested``: the key under ``text_config`` counts all the same (Qwen2-VL and Qwen2.5-VL, as older files have it).
    """
    text = bool(text_section(config).get("tie_word_embeddings"))
    return bool(config.get("tie_word_embeddings", text)) or (nested and text)


class MRopeModel(VisionLanguageModel):
    """``vision_tower(media)`` gives Features; ``language_model`` is the decoder."""

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        vision: nn.Module,
        decoder: Decoder,
        text: DecoderConfig,
        rope: MRope,
        placeholders: Placeholders,
    ) -> None:
        super().__init__(config)
        self.vision_tower = vision
        self.language_model = decoder
        self.text, self.rope, self.placeholders = text, rope, placeholders

    @property
    def context_length(self) -> int:
        return self.text.max_position_embeddings

    def encode(self, media: Sequence[Media]) -> list[Features]:
        return [self.vision_tower(item) for item in media]

    def encode_stages(self, media: Media) -> Stages[Features]:
        return self.vision_tower.stages(media)  # type: ignore[no-any-return]

    def media_places(self, input_ids: Sequence[int], media: Sequence[Media]) -> list[Places]:
        return self.placeholders.find(input_ids, media)

    def embed(
        self, input_ids: Sequence[int], features: Sequence[Features | None], media: Sequence[Media]
    ) -> Embedded:
        positions, delta = self.placeholders.positions(input_ids, media)
        places = self.placeholders.find(input_ids, media)
        hidden = self.language_model.model.embed(self.token_array(input_ids))
        known = [(place, found) for place, found in zip(places, features, strict=True) if found is not None]
        if places:
            everywhere = np.concatenate(places)
            hidden[mx.array(everywhere)] = mx.zeros((len(everywhere), hidden.shape[1]), hidden.dtype)
        for place, found in known:
            hidden[mx.array(place)] = found.embeddings.astype(hidden.dtype)
        taps = []
        for tap in range(max((len(found.deepstack) for _, found in known), default=0)):
            dense = mx.zeros_like(hidden)
            for place, found in known:
                dense[mx.array(place)] = found.deepstack[tap].astype(hidden.dtype)
            taps.append(dense[None])
        return Embedded(
            embeddings=hidden[None],
            positions=mx.array(positions),
            rope_delta=delta,
            deepstack=tuple(taps),
            prompt_length=len(input_ids),
        )

    def __call__(
        self, embedded: Embedded, cache: Cache | None = None, *, last_only: bool = False
    ) -> mx.array:
        positions = embedded.positions
        if cache is not None:
            delta = embedded.rope_delta
            if embedded.start == 0 and not cache.is_empty:
                before = cache.next_position.reshape(-1, 1)
                positions = (positions[:, None] if positions.ndim == 2 else positions) + before
                delta = cache.rope_delta + delta
            cache.rope_delta = mx.broadcast_to(mx.array(delta, mx.int32), (cache.rows,))
        return self.language_model(
            embedded.embeddings,
            self.rope.at(positions),
            cache,
            deepstack=embedded.deepstack,
            last_only=last_only,
        )

    def decode(self, tokens: mx.array, cache: Cache, *, last_only: bool = False) -> mx.array:
        hidden = self.language_model.model.embed(tokens)
        positions = cache.next_position.reshape(-1, 1) + mx.arange(tokens.shape[1])  # [B, L]
        return self.language_model(hidden, self.rope.text(positions), cache, last_only=last_only)

    def make_cache(self) -> Cache:
        return Cache(
            mixer.new_cache() for layer in self.language_model.model.layers for mixer in layer.mixers
        )
