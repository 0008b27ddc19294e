"""The decoder: token embedding, layers, final norm, vocabulary. What its layers are is each generation's choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from qwenvl_mlx.config import one_of
from qwenvl_mlx.layers.attention import Pass
from qwenvl_mlx.layers.cache import Cache, by_layer
from qwenvl_mlx.layers.linear import add_linear, apply, by_outputs
from qwenvl_mlx.layers.mlp import MLP
from qwenvl_mlx.layers.norm import RMSNorm
from qwenvl_mlx.layers.over_cores import add_parts, parts_of, split
from qwenvl_mlx.layers.rotary import Angles


@dataclass(frozen=True)
class DecoderConfig:
    """Keys that all decoders have; ``head_dim`` is derived where the checkpoint leaves it out."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    intermediate_size: int = 0
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_bias: bool = False
    use_sliding_window: bool = False

    def __post_init__(self) -> None:
        one_of(self.hidden_act, ["silu"], key="hidden_act")
        one_of(bool(self.use_sliding_window), [False], key="use_sliding_window")

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads


class DecoderLayer(nn.Module):
    """Pre-norm mixer (attention) and feed-forward, each added to the stream. ``name``: the mixer's, in the weights."""

    def __init__(
        self, config: DecoderConfig, mixer: nn.Module, mlp: nn.Module, name: str = "self_attn"
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = name
        self[name] = mixer
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = mlp

    def prepare(self) -> None:
        """Deal both out over the cores of a processor."""
        self[self.mixer] = split(self[self.mixer])  # one by one: what was whole is freed
        self.mlp = split(self.mlp)

    @property
    def mixers(self) -> Sequence[nn.Module]:
        """One, or one for each core; each has a cache of its own."""
        return parts_of(self[self.mixer])

    def __call__(self, x: mx.array, shared: Pass, caches: Sequence[Any]) -> mx.array:
        """``caches``: of each mixer; None for those that keep nothing."""
        normed = self.input_layernorm(x)

        def mix(mixer: nn.Module, core: int, residual: mx.array | None) -> mx.array:
            mixed = mixer(normed, shared, caches[core])
            return add_linear(residual, mixer.output, mixed[:, -1:] if shared.last_only else mixed)

        x = add_parts(x[:, -1:] if shared.last_only else x, self[self.mixer], mix)
        normed = self.post_attention_layernorm(x)
        return add_parts(x, self.mlp, lambda mlp, _, residual: add_mlp(residual, mlp, normed))


def add_mlp(residual: mx.array | None, mlp: nn.Module, x: mx.array) -> mx.array:
    """``residual + mlp(x)``, the sum within the last product where there is one; ``mlp(x)`` without a residual."""
    if isinstance(mlp, MLP):
        return add_linear(residual, mlp.down_proj, mlp.inner(x))
    update: mx.array = mlp(x)
    return update if residual is None else residual + update


class Body(nn.Module):
    """``language_model.model``: everything but the output layer."""

    def __init__(self, config: DecoderConfig, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = list(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._type: mx.Dtype | None = None

    def prepare(self) -> None:
        """Note the model's type where the table is in one of MLX's floating point modes, which gives bfloat16."""
        if getattr(self.embed_tokens, "mode", "affine") != "affine":
            types = {array.dtype for array in dict(tree_flatten(self.parameters())).values()}
            # The narrowest: single norms may be kept in float32.
            self._type = min(
                (one for one in types if mx.issubdtype(one, mx.floating)), key=lambda one: one.size
            )

    def embed(self, tokens: mx.array) -> mx.array:
        """Embeddings ``[…, hidden_size]`` in the model's type."""
        hidden: mx.array = self.embed_tokens(tokens)
        return hidden if self._type is None else hidden.astype(self._type)


class Decoder(nn.Module):
    """``language_model``. ``tied``: the output layer is the token embedding."""

    def __init__(self, config: DecoderConfig, layers: Sequence[nn.Module], *, tied: bool) -> None:
        super().__init__()
        self.model = Body(config, layers)
        if not tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(
        self,
        hidden: mx.array,
        angles: Angles,
        cache: Cache | None,
        *,
        deepstack: Sequence[mx.array] = (),
        last_only: bool = False,
    ) -> mx.array:
        """``hidden``: ``[B, L, d]`` -> logits. ``deepstack[k]`` is added to the output of layer ``k``.

        Layers get ``[B, L, d]``, or ``[B, d]`` of single tokens.
        """
        shared = Pass.over(hidden, angles, cache)
        single = hidden.shape[1] == 1 and not deepstack
        if single:  # a matrix: products of three axes cost reshapes, and on CPUs a run through the weights for each row
            hidden = hidden.squeeze(1)
        layers = self.model.layers
        states = by_layer(cache, [len(layer.mixers) for layer in layers])
        for index, (layer, caches) in enumerate(zip(layers, states, strict=True)):
            if last_only and not single and len(deepstack) <= index == len(layers) - 1:
                shared = shared.of_last()
            hidden = layer(hidden, shared, caches)
            if index < len(deepstack):
                hidden = hidden + deepstack[index]
        logits = self._output(self.model.norm(hidden[:, -1:] if last_only and not single else hidden))
        return logits[:, None] if single else logits

    def _output(self, hidden: mx.array) -> mx.array:
        if "lm_head" in self:
            return apply(self.lm_head, hidden)
        return by_outputs(lambda part, _: part.as_linear(hidden), self.model.embed_tokens, hidden)
