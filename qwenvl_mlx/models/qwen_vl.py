"""The original Qwen-VL and Qwen-VL-Chat (2023): ``model_type`` ``qwen`` with a ``visual`` section.

Source of every rule: the PyTorch code of the Qwen-VL-Chat repository. Names of modules are the hub's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qwenvl_mlx.config import from_dict, one_of
from qwenvl_mlx.errors import ConfigError, MediaError, PromptError
from qwenvl_mlx.layers.cache import Cache, FixedKV, by_layer, kv
from qwenvl_mlx.layers.dynamic_ntk import Positions, Rotary
from qwenvl_mlx.layers.fused import attend_cached, last_query
from qwenvl_mlx.layers.linear import add_linear, apply, join, joinable
from qwenvl_mlx.layers.mlp import gated
from qwenvl_mlx.layers.mlx_lm import leaf
from qwenvl_mlx.layers.over_cores import add_parts, parts_of, split
from qwenvl_mlx.layers.shard import Members, part_of, split_inputs, split_outputs
from qwenvl_mlx.layers.stages import Stages
from qwenvl_mlx.media import Embedded, Features, Media
from qwenvl_mlx.models.base import Places, VisionLanguageModel
from qwenvl_mlx.models.qwen_vl_vision import VisionConfig, VisionTower, vision_config
from qwenvl_mlx.models.qwen_vl_vision import sanitize as sanitize_vision

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

RENAMES = (("transformer.", "language_model.model."), ("lm_head.", "language_model.lm_head."))
HUB_VISION = "transformer.visual."

attention = leaf("models.base")


@dataclass(frozen=True)
class Config:
    """``config.json``; ``intermediate_size`` is twice the width of the feed-forward layer."""

    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    num_hidden_layers: int
    intermediate_size: int
    kv_channels: int
    seq_length: int
    max_position_embeddings: int
    layer_norm_epsilon: float
    rotary_emb_base: float = 10000.0
    rotary_pct: float = 1.0
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    no_bias: bool = True
    tie_word_embeddings: bool = False
    scale_attn_weights: bool = True

    def __post_init__(self) -> None:
        one_of(self.tie_word_embeddings, [False], key="tie_word_embeddings")
        one_of(self.scale_attn_weights, [True], key="scale_attn_weights")
        if self.kv_channels * self.num_attention_heads != self.hidden_size:
            raise ConfigError("config.json: kv_channels * num_attention_heads must be hidden_size")
        if not 0 < self.rotary_pct <= 1 or self.rotary_dims % 2 or self.rotary_dims < 4:
            raise ConfigError(f"config.json: rotary_pct = {self.rotary_pct} is not known; known: 1.0")

    @property
    def rotary_dims(self) -> int:
        return int(self.kv_channels * self.rotary_pct)

    @property
    def rotary(self) -> Rotary:
        return Rotary(
            dims=self.rotary_dims,
            base=float(self.rotary_emb_base),
            trained=self.seq_length,
            dynamic_ntk=self.use_dynamic_ntk,
            logn=self.use_logn_attn,
        )


class Attention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self._scale = config.kv_channels**-0.5
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=not config.no_bias)

    def shard(self, group: Members) -> None:
        """Keep this machine's heads."""
        self.heads = part_of(self.heads, group, "attention heads")
        split_outputs(self.c_attn, group, segments=3)
        self.c_proj = split_inputs(self.c_proj, group)

    def __call__(
        self,
        residual: mx.array | None,
        x: mx.array,
        positions: Positions,
        mask: mx.array | str | None,
        layer: Any,
        last_only: bool,
    ) -> mx.array:
        """``residual``, already of the last token where ``last_only``, and what is added to it."""
        batch, length = len(x), 1 if x.ndim == 2 else x.shape[1]
        heads = apply(self.c_attn, x).reshape(batch, length, 3 * self.heads, -1)
        if isinstance(layer, FixedKV) and length == 1:
            turned = positions.rotate(heads.transpose(2, 0, 1, 3)).swapaxes(0, 1)  # see Positions.by_heads
            query, both = mx.split(turned, [self.heads], axis=1)
            key, value = layer.write(both)
        else:
            heads = heads.transpose(0, 2, 1, 3)
            rotated = positions.rotate(heads[:, : 2 * self.heads])  # queries and keys in one call
            query, key = mx.split(rotated, 2, axis=1)
            value = heads[:, 2 * self.heads :]
            if layer is not None:
                key, value = layer.update_and_fetch(key, value)
        scale = self._scale
        if isinstance(positions.query_factor, mx.array):
            query = query * positions.query_factor
        else:
            scale *= positions.query_factor
        if last_only:
            query, mask = query[:, :, -1:], last_query(mask)
        out = attend_cached(query, key, value, layer, scale=scale, mask=mask)
        out = out if query.shape[2] == 1 else out.transpose(0, 2, 1, 3)
        lengths = () if x.ndim == 2 else (query.shape[2],)
        out = out.reshape(batch, *lengths, -1)
        return add_linear(residual, self.c_proj, out)


class MLP(nn.Module):
    """``w2`` is the gate, ``w1`` what it lets through."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, bias = config.intermediate_size // 2, not config.no_bias
        self.w1 = nn.Linear(config.hidden_size, width, bias=bias)
        self.w2 = nn.Linear(config.hidden_size, width, bias=bias)
        self.c_proj = nn.Linear(width, config.hidden_size, bias=bias)

    def shard(self, group: Members) -> None:
        """Keep this machine's part of the inner width."""
        split_outputs(self.w1, group)
        split_outputs(self.w2, group)
        self.c_proj = split_inputs(self.c_proj, group)

    def prepare(self) -> None:
        if joinable(self.w1, self.w2):
            self.gate_up = join(self.w2, self.w1)
            del self.w1, self.w2

    def __call__(self, residual: mx.array | None, x: mx.array) -> mx.array:
        if "gate_up" in self:
            gate, up = mx.split(apply(self.gate_up, x), 2, axis=-1)
        else:
            gate, up = apply(self.w2, x), apply(self.w1, x)
        return add_linear(residual, self.c_proj, gated(gate, up))


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.ln_1 = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn: nn.Module = Attention(config)
        self.ln_2 = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp: nn.Module = MLP(config)

    def prepare(self) -> None:
        """Deal both out over the cores of a processor."""
        self.attn = split(self.attn)
        self.mlp = split(self.mlp)

    @property
    def attentions(self) -> Sequence[nn.Module]:
        """One, or one for each core; each has a cache of its own."""
        return parts_of(self.attn)

    def __call__(
        self,
        x: mx.array,
        positions: Positions,
        mask: mx.array | str | None,
        caches: Sequence[Any],
        last_only: bool,
    ) -> mx.array:
        """``caches``: of each attention; ``last_only``: of the last token alone."""
        normed = self.ln_1(x)

        def attend(attn: nn.Module, core: int, residual: mx.array | None) -> mx.array:
            out: mx.array = attn(residual, normed, positions, mask, caches[core], last_only)
            return out

        x = add_parts(x[:, -1:] if last_only else x, self.attn, attend)
        normed = self.ln_2(x)
        return add_parts(x, self.mlp, lambda mlp, _, residual: mlp(residual, normed))


class Decoder(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = [Block(config) for _ in range(config.num_hidden_layers)]
        self.ln_f = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def embed(self, tokens: mx.array) -> mx.array:
        """Embeddings in the model's type: a table in one of MLX's floating point modes gives bfloat16."""
        hidden: mx.array = self.wte(tokens).astype(self.ln_f.weight.dtype)
        return hidden

    def __call__(self, x: mx.array, positions: Positions, cache: Cache | None, last_only: bool) -> mx.array:
        first = cache[0] if cache else None
        mask = attention.create_attention_mask(x, first)
        by_heads: dict[int, Positions] = {}
        single = x.shape[1] == 1
        if single and isinstance(first, FixedKV):
            parts = {block.attentions[0].heads for block in self.h}
            by_heads = {heads: positions.by_heads(2 * heads, 3 * heads) for heads in parts}
        x = x.squeeze(1) if single else x  # products of matrices cost no reshapes
        states = by_layer(cache, [len(block.attentions) for block in self.h])
        for block, caches in zip(self.h, states, strict=True):
            positions = by_heads.get(block.attentions[0].heads, positions)
            x = block(x, positions, mask, caches, last_only and not single and block is self.h[-1])
        return x[:, None] if single else x


class LanguageModel(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class Model(VisionLanguageModel):
    """``patches`` of a ``Media`` are a picture ``[3, S, S]``; each takes ``n_queries`` tokens of the prompt."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        if not isinstance(config.get("visual"), Mapping):
            raise ConfigError("this checkpoint is the text-only Qwen: run it with mlx-lm (mlx_lm.generate)")
        self.config = from_dict(Config, config)
        self.vision: VisionConfig = vision_config(config["visual"])
        if self.vision.output_dim != self.config.hidden_size:
            raise ConfigError(
                "config.json: visual.output_dim must be hidden_size: features stand among tokens"
            )
        self.vision_tower = VisionTower(self.vision)
        self.language_model = LanguageModel(self.config)

    @classmethod
    def sanitize(cls, weights: dict[str, mx.array], config: Mapping[str, Any]) -> dict[str, mx.array]:
        clean: dict[str, mx.array] = {}
        for name, weight in weights.items():
            if name.startswith(HUB_VISION):
                parts = sanitize_vision(name.removeprefix(HUB_VISION), weight)
                clean |= {f"vision_tower.{part}": array for part, array in parts.items()}
            else:
                old, new = next((pair for pair in RENAMES if name.startswith(pair[0])), ("", ""))
                clean[new + name.removeprefix(old)] = weight
        return clean

    def encode(self, media: Sequence[Media]) -> list[Features]:
        return [Features(self.vision_tower(self._pixels(item))) for item in media]

    def encode_stages(self, media: Media) -> Stages[Features]:
        return Features((yield from self.vision_tower.stages(self._pixels(media))))

    def _pixels(self, item: Media) -> mx.array:
        size = self.vision.image_size
        if item.kind != "image":
            raise MediaError("the original Qwen-VL takes pictures only: give single frames of the video")
        if tuple(item.patches.shape) != (3, size, size):
            raise MediaError(
                f"a picture of this checkpoint is [3, {size}, {size}], not {list(item.patches.shape)}"
            )
        pixels = mx.array(item.patches)
        if pixels.dtype != mx.uint8:
            return pixels
        mean, std = (
            mx.array(value)[:, None, None] for value in (item.mean or PIXEL_MEAN, item.std or PIXEL_STD)
        )
        return (pixels.astype(mx.float32) / 255 - mean) / std

    def media_places(self, input_ids: Sequence[int], media: Sequence[Media]) -> list[Places]:
        return self._places(input_ids, len(media))

    def _places(self, input_ids: Sequence[int], pictures: int) -> list[Places]:
        """The slots of each picture; raises ``PromptError`` unless there is an ``<img>`` for each, and its slots."""
        start, end, slots = self.vision.image_start_id, self.vision.image_start_id + 1, self.vision.n_queries
        ids = np.asarray(input_ids, np.int32)
        starts = np.flatnonzero(ids == start)
        if len(starts) != pictures:
            raise PromptError(
                f"the prompt has {len(starts)} <img>, and {pictures} pictures came with it: give one for each"
            )
        for at in starts:
            inside = ids[at + 1 : at + 2 + slots]
            if len(inside) <= slots or inside[-1] != end or np.isin(inside[:-1], (start, end)).any():
                raise PromptError(f"the <img> at token {at} must be followed by {slots} slots and </img>")
        return [at + 1 + np.arange(slots) for at in starts]

    def embed(
        self, input_ids: Sequence[int], features: Sequence[Features | None], media: Sequence[Media]
    ) -> Embedded:
        """A picture stands in ``<img>``, ``n_queries`` slots, ``</img>``: whatever the slots hold is overwritten."""
        places, length = self._places(input_ids, len(features)), len(input_ids)
        hidden = self.language_model.model.embed(self.token_array(input_ids))  # [L, hidden]
        if places:
            empty = mx.zeros((self.vision.n_queries, hidden.shape[1]), hidden.dtype)
            rows = [empty if item is None else item.embeddings.astype(hidden.dtype) for item in features]
            hidden[mx.array(np.concatenate(places))] = mx.concatenate(rows)
        positions = mx.broadcast_to(mx.arange(length, dtype=mx.int32), (3, length))
        return Embedded(hidden[None], positions, prompt_length=length)

    def __call__(
        self, embedded: Embedded, cache: Cache | None = None, *, last_only: bool = False
    ) -> mx.array:
        if cache is None:
            alphas = self._alphas(embedded, None)
            return self._logits(embedded.embeddings, embedded.start, alphas, None, last_only)
        if cache.attention.empty() or (isinstance(cache.offset, int) and cache.offset == 0):
            cache.ntk_alpha = self._alphas(embedded, cache.attention)
        return self._logits(embedded.embeddings, cache.offset, cache.ntk_alpha, cache, last_only)

    def _alphas(self, embedded: Embedded, layer: Any) -> tuple[float, ...]:
        """The NTK factor of each row, by the length of its whole prompt without padding."""
        length = embedded.prompt_length or embedded.start + len(embedded)
        padding = getattr(layer, "left_padding", None)  # of a batch: made from a list, nothing is waited for
        if padding is None:
            return (self.rope_key(length),) * len(embedded.embeddings)
        return tuple(self.rope_key(length - width) for width in padding.tolist())

    def decode(self, tokens: mx.array, cache: Cache, *, last_only: bool = False) -> mx.array:
        hidden = self.language_model.model.embed(tokens)
        return self._logits(hidden, cache.offset, cache.ntk_alpha, cache, last_only)

    def _logits(
        self,
        hidden: mx.array,
        offset: int | mx.array,
        alphas: Sequence[float],
        cache: Cache | None,
        last_only: bool,
    ) -> mx.array:
        first = cache[0] if cache else None
        most = first.capacity if isinstance(first, FixedKV) else None
        positions = self.config.rotary.at(offset, hidden.shape[1], alphas, hidden.dtype, most=most)
        hidden = self.language_model.model(hidden, positions, cache, last_only)
        return apply(self.language_model.lm_head, self.language_model.model.ln_f(hidden))

    def make_cache(self) -> Cache:
        return Cache(kv.KVCache() for block in self.language_model.model.h for _ in block.attentions)

    def rope_key(self, prompt_length: int) -> float:
        return self.config.rotary.alpha(prompt_length)

    @property
    def context_length(self) -> int:
        return self.config.max_position_embeddings
