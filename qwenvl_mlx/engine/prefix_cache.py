"""Remember what was read: KV rows of earlier prompts and answers, and the features of pictures.

A prompt is known by its token ids, with the content of its media in place of their placeholders: the same picture
is the same prefix, from whatever place it came. Rows are shared where that keeps no more memory than they need:
MLX's arrays don't change once they are in here.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from qwenvl_mlx.layers.cache import Cache
from qwenvl_mlx.media import Features, Prompt
from qwenvl_mlx.models.base import VisionLanguageModel

Ids = NDArray[np.int64]
FEATURE_SHARE = 0.25  # of the budget; features are small beside the KV rows of the same tokens
SLACK = 1.125  # a buffer of more rows than that, compared with those in use, is not kept for their sake


def content_ids(model: VisionLanguageModel, prompt: Prompt) -> Ids:
    """Token ids ``[L]`` in which each media token is a negative number made from the media's digest.

    Raises ``PromptError`` when placeholders and media don't fit each other.
    """
    ids = np.array(prompt.input_ids, np.int64)
    for media, places in zip(prompt.media, model.media_places(prompt.input_ids, prompt.media), strict=True):
        digest = hashlib.blake2b(media.digest.encode(), digest_size=7).digest()
        ids[places] = -1 - int.from_bytes(digest) - np.arange(len(places))
    return ids


@dataclass(frozen=True, eq=False)
class Entry:
    """A sequence whose state is kept. ``rope_key``: see ``VisionLanguageModel.rope_key``."""

    ids: Ids
    rope_key: float
    cache: Cache

    def usable(self, ids: Ids, rope_key: float) -> int:
        """How many of the first tokens of ``ids`` it saves; at least one is left to compute logits from."""
        if rope_key != self.rope_key:
            return 0
        common = min(shared_length(self.ids, ids), len(ids) - 1)
        return common if self.cache.trimmable or common == len(self.ids) else 0


class PrefixCache:
    """Entries up to a budget in bytes; the one longest unused goes first."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._entries: OrderedDict[int, Entry] = OrderedDict()
        self._features: OrderedDict[str, Features] = OrderedDict()
        self._names = count()
        self._entry_bytes = self._feature_bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes that are kept, KV rows and features."""
        return self._entry_bytes + self._feature_bytes

    def __len__(self) -> int:
        return len(self._entries)

    def take(self, ids: Ids, rope_key: float) -> tuple[Cache, int] | None:
        """A cache of its own with as many first tokens of ``ids`` as are known, and their number."""
        known = {name: entry.usable(ids, rope_key) for name, entry in self._entries.items()}
        name = max(known, key=known.__getitem__, default=None)
        if name is None or known[name] == 0:
            return None
        self._entries.move_to_end(name)
        return share(self._entries[name].cache, known[name]), known[name]

    def put(self, ids: Ids, rope_key: float, cache: Cache) -> None:
        """Keep the state after ``ids``. The caller may go on with ``cache``."""
        entry = Entry(ids, rope_key, share(cache, len(ids), to_keep=True))
        if len(ids) == 0 or entry.cache.nbytes > self.budget * (1 - FEATURE_SHARE):
            return
        mx.eval(entry.cache.arrays)  # lazily, they would hold the buffers that they are taken from
        for name, old in list(self._entries.items()):
            covered = old.rope_key == rope_key and shared_length(old.ids, ids) == len(old.ids)
            if covered and (cache.trimmable or len(old.ids) == len(ids)):
                self._forget(name)
        self._entries[next(self._names)] = entry
        self._entry_bytes += entry.cache.nbytes
        self.shrink(int(self.budget * (1 - FEATURE_SHARE)))

    def shrink(self, count: int) -> None:
        """Forget the oldest entries until the KV rows take no more than ``count`` bytes."""
        while self._entry_bytes > count:
            self._forget(next(iter(self._entries)))

    def features(self, digest: str) -> Features | None:
        """What the vision tower gave for this content, if it is still here."""
        if digest in self._features:
            self._features.move_to_end(digest)
        return self._features.get(digest)

    def put_features(self, digest: str, features: Features) -> None:
        """Keep the vision tower's result."""
        self._features[digest] = features
        self._feature_bytes += features.nbytes
        while self._feature_bytes > self.budget * FEATURE_SHARE:
            self._feature_bytes -= self._features.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._features.clear()
        self._entry_bytes = self._feature_bytes = 0

    def _forget(self, name: int) -> None:
        self._entry_bytes -= self._entries.pop(name).cache.nbytes


def share(cache: Cache, length: int, *, to_keep: bool = False) -> Cache:
    """The first ``length`` tokens of a sequence's state, as a cache that can go its own way.

    A recurrent layer's state can't be cut: it must be the one after ``length`` tokens. ``to_keep``: copy rows out of
    buffers that are much larger.
    """
    layers = [_share_layer(layer, length, SLACK * length if to_keep else math.inf) for layer in cache]
    return Cache(layers, cache.rope_delta[:], cache.ntk_alpha)


def _share_layer(layer: Any, length: int, largest: float) -> Any:
    state = layer.state
    if hasattr(layer, "offset"):  # KVCache; quantised ones have group size and bits besides
        _, _, _, *settings = state
        keys, values = (_rows(arrays, length, largest) for arrays in (layer.keys, layer.values))
        return type(layer).from_state((keys, values, length, *settings))
    arrays, *padding = state
    return type(layer).from_state(([array[:] for array in arrays], *padding))


def _rows(arrays: mx.array | Sequence[mx.array], length: int, largest: float) -> Any:
    if not isinstance(arrays, mx.array):
        return tuple(_rows(array, length, largest) for array in arrays)
    if arrays.shape[-2] <= largest:
        return arrays[..., :length, :]
    return mx.take(arrays, mx.arange(length), axis=-2)  # a slice or mx.contiguous may share the buffer


def shared_length(a: Ids, b: Ids) -> int:
    """Length of the longest common beginning. Most sequences part early: looks further and further."""
    length, begin, step = min(len(a), len(b)), 0, 256
    while begin < length:
        end = min(begin + step, length)
        different = np.flatnonzero(a[begin:end] != b[begin:end])
        if len(different):
            return begin + int(different[0])
        begin, step = end, 4 * step
    return length
