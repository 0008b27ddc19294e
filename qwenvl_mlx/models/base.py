"""What every generation offers: encode media, embed a prompt, run the decoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from qwenvl_mlx.errors import PromptError
from qwenvl_mlx.layers.cache import Cache
from qwenvl_mlx.layers.cores import stay_alone
from qwenvl_mlx.layers.linear import keep_view
from qwenvl_mlx.layers.shard import Group
from qwenvl_mlx.layers.stages import Stages
from qwenvl_mlx.media import Embedded, Features, Media, Prompt

Places = NDArray[np.int64]


def prepare_below(module: nn.Module) -> None:
    """``prepare`` of every module within, layer by layer; also of those that another's ``prepare`` has put there."""
    for child in dict(tree_flatten(module.children(), is_leaf=nn.Module.is_module)).values():
        if hasattr(child, "prepare"):
            child.prepare()
        prepare_below(child)


class VisionLanguageModel(nn.Module, ABC):
    """A pure function of its inputs and caches. Parameters have the names of the MLX folder:
    ``vision_tower.*``, ``language_model.model.*``, ``language_model.lm_head.*``.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """``config``: the whole ``config.json``; ``ConfigError`` for a value that is not known."""
        super().__init__()
        text = config.get("text_config") or config
        self.vocab_size = int(text.get("vocab_size", config.get("vocab_size", 0)))
        self.sharded = False  # over several machines
        self.prepared = False

    @classmethod
    @abstractmethod
    def sanitize(cls, weights: dict[str, mx.array], config: Mapping[str, Any]) -> dict[str, mx.array]:
        """Weights under any known layout -> the MLX folder's names, shapes and orientation.

        Pure, lazy (evaluates nothing) and idempotent. Suffixes of quantised modules (``.weight``, ``.scales``,
        ``.biases``) follow their module's name. Unknown names pass unchanged, so that the strict load lists them.
        """

    @classmethod
    def keep_float32(cls, name: str) -> bool:
        """Whether this parameter stays in float32 whatever type the rest of the model is loaded in."""
        return False

    def shard(self, group: Group) -> None:
        """Called once before ``prepare``, to keep only this machine's part of the decoder's layers."""
        self.sharded = True
        stay_alone()
        for module in self.modules():
            if module is not self and hasattr(module, "shard"):
                module.shard(group)

    def prepare(self) -> None:
        """Called after loading: join weights, cut layers over a processor's cores, compute tables; a second time does
        nothing. Layouts made here are never stored.
        """
        if not self.prepared:
            self.prepared = True
            prepare_below(self)
            self.apply_to_modules(lambda _, module: keep_view(module))

    @abstractmethod
    def encode(self, media: Sequence[Media]) -> list[Features]:
        """Run the vision tower, one media item at a time (lazy: the caller evaluates; a CPU has done the blocks)."""

    def encode_stages(self, media: Media) -> Stages[Features]:
        """``encode`` of one item, pausing between the tower's blocks: evaluate what it yields, or go on."""
        yield from ()
        return self.encode([media])[0]

    @abstractmethod
    def embed(
        self, input_ids: Sequence[int], features: Sequence[Features | None], media: Sequence[Media]
    ) -> Embedded:
        """Token embeddings with the media's features in their places, and the positions of all tokens.

        ``features[i]`` may be None where the tokens of ``media[i]`` are already in the KV cache: zeros stand in.
        Raises ``PromptError`` when placeholders and media don't fit each other.
        """

    def token_array(self, input_ids: Sequence[int]) -> mx.array:
        """Ids for an embedding, int32 ``[L]``; ``PromptError`` for one beyond its rows, which MLX does not check."""
        ids = np.asarray(input_ids, np.int64)
        strange = ids[(ids < 0) | (ids >= self.vocab_size)]
        if len(strange):
            raise PromptError(
                f"{strange[0]} is no token of this model: ids go from 0 to {self.vocab_size - 1}"
            )
        return mx.array(ids.astype(np.int32))

    @abstractmethod
    def media_places(self, input_ids: Sequence[int], media: Sequence[Media]) -> list[Places]:
        """For each media item, the indices of the tokens that its features take. ``PromptError`` as ``embed``."""

    @abstractmethod
    def __call__(
        self, embedded: Embedded, cache: Cache | None = None, *, last_only: bool = False
    ) -> mx.array:
        """Logits ``[B, L, vocab]``, or ``[B, 1, vocab]`` of the last token with ``last_only``.

        With a cache, its tokens are what came before. ``embedded`` may be a slice of a longer prompt; a fresh one
        (``start == 0``) given to a cache that is not empty continues after the cached tokens.
        """

    @abstractmethod
    def decode(self, tokens: mx.array, cache: Cache, *, last_only: bool = False) -> mx.array:
        """Text tokens ``[B, L]`` after what is cached -> logits ``[B, L, vocab]``; ``last_only`` as above."""

    @abstractmethod
    def make_cache(self) -> Cache:
        """An empty cache for one sequence."""

    def rope_key(self, prompt_length: int) -> float:
        """KV rows may be shared only by prompts of equal key (dynamic NTK of the original Qwen-VL)."""
        return 1.0

    @property
    @abstractmethod
    def context_length(self) -> int:
        """The longest sequence that the checkpoint supports, in tokens."""

    def logits(self, prompt: Prompt) -> mx.array:
        """Encode, embed and run a whole prompt: ``[1, L, vocab]``."""
        features = self.encode(prompt.media)
        return self(self.embed(prompt.input_ids, features, prompt.media))
