"""Empty KV caches as the engine's options want them, and what a token costs in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from qwenvl_mlx.errors import GenerationError
from qwenvl_mlx.layers.cache import Cache, kv
from qwenvl_mlx.models.base import VisionLanguageModel

GROUP_SIZES = (64, 32)


@dataclass(frozen=True)
class KvCost:
    """Bytes of a sequence's state: for each token, and whatever its length."""

    token: float
    fixed: int


def cache_maker(model: VisionLanguageModel, bits: int | None) -> Callable[[], Cache]:
    """What makes an empty cache for one sequence, quantised from the first token on if ``bits`` says so.

    Quantising later would make an answer depend on where the prompt was cut into slices.
    """
    if bits is None:
        return model.make_cache
    sizes = {array.shape[-1] for layer in _probe(model) for array in (layer.keys, layer.values)}
    group = next((group for group in GROUP_SIZES if all(size % group == 0 for size in sizes)), None)
    if group is None:
        raise GenerationError(f"kv_bits does not fit heads of {sorted(sizes)} numbers: leave it out")

    def make() -> Cache:
        cache = model.make_cache()
        cache[:] = [
            kv.QuantizedKVCache(group, bits) if isinstance(layer, kv.KVCache) else layer for layer in cache
        ]
        return cache

    return make


def kv_cost(model: VisionLanguageModel, bits: int | None) -> KvCost:
    """What the model's caches will take."""
    cache = _used(model)
    per_token = 0.0
    for layer in cache:
        if isinstance(layer, kv.KVCache):
            for array in (layer.keys, layer.values):
                numbers = array.shape[1] * array.shape[-1]
                size = array.itemsize if bits is None else bits / 8 + 2 * array.itemsize / GROUP_SIZES[0]
                per_token += numbers * size
    fixed = sum(layer.nbytes for layer in cache if not isinstance(layer, kv.KVCache))
    return KvCost(per_token, fixed)


def _probe(model: VisionLanguageModel) -> list[kv.KVCache]:
    return [layer for layer in _used(model) if isinstance(layer, kv.KVCache)]


def _used(model: VisionLanguageModel) -> Cache:
    """A cache after one token, with the shapes of all arrays but none of them computed."""
    cache = model.make_cache()
    model.decode(mx.zeros((1, 1), mx.int32), cache)
    return cache
