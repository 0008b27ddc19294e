"""What this machine's memory allows, and what a request will take of it."""

from __future__ import annotations

import ctypes
import math
import os
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from qwenvl_mlx.engine.kv import kv_cost
from qwenvl_mlx.errors import OutOfMemory
from qwenvl_mlx.media import Media, Prompt
from qwenvl_mlx.models.base import VisionLanguageModel

CPU_SHARE = 0.75  # of the RAM; a GPU names its own recommended working set
CACHE_SHARE = 0.25  # of what is free after the model is loaded
EXPECTED_ANSWER = 2048  # tokens that are planned for where a request names no limit, or a higher one
LIVE_BLOCKS = (
    5  # measured peaks of vision towers: 2.9 to 4.1 times what the linear layers of one block give out
)
SMALLEST_SHARE = 0.01
COPIES = 4  # of caches on their way into a batch and out of it
SMALL_PADDING = 1 << 26  # bytes of padding that are not worth a second batch, however small the model


def working_set() -> int:
    """Bytes that may be used on the default device."""
    if on_gpu():
        recommended = mx.device_info().get("max_recommended_working_set_size")
        if recommended:
            return int(recommended)
    return int(total_memory() * CPU_SHARE)


def total_memory() -> int:
    """Bytes of RAM."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def default_cache_bytes() -> int:
    """Budget of the prefix cache where nobody named one. Call it after the model is loaded."""
    return int(max(working_set() - mx.get_active_memory(), 0) * CACHE_SHARE)


def on_gpu() -> bool:
    return bool(mx.default_device().type == mx.DeviceType.gpu)


def give_back() -> None:
    """Return the free pages of the C heap to the system, holes between living objects too; a few milliseconds.

    glibc does that at the heap's end only. Where the C library has no such call, nothing is done.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class MemoryPlan:
    """What requests to one model take. ``limit``: bytes for the model and all that it works on."""

    def __init__(self, model: VisionLanguageModel, kv_bits: int | None, limit: int | None = None) -> None:
        self.limit = working_set() if limit is None else limit
        arrays = dict(tree_flatten(model.parameters()))
        self.weights: int = sum(array.nbytes for array in arrays.values())
        self._model = model
        self._kv = kv_cost(model, kv_bits)
        self._width, self._itemsize = _vision_shape(getattr(model, "vision_tower", None))

    @property
    def free(self) -> int:
        """Bytes beside the weights."""
        return int(self.limit - self.weights)

    def padding(self, tokens: int) -> int:
        """Bytes of so many tokens of padding in a batch's cache."""
        return int(self._kv.token * tokens)

    def allows_padding(self, tokens: int, taken: int) -> bool:
        """Whether a batch with so much padding is better than two batches, where ``taken`` bytes are planned already.

        A second batch reads the weights a second time in every step; a padded cache is read with its padding.
        """
        room = min(max(self.weights, SMALL_PADDING), self.free - taken)
        return self.padding(tokens) <= max(room, 0)

    def allows_copies(self, tokens: int, taken: int) -> bool:
        """Whether so many tokens of cache may be copied to be read as one, where ``taken`` bytes are planned already.

        Reading prompts one by one reads the weights once for each; more than that is not worth copying.
        """
        return self.allows_padding(COPIES * tokens, taken)

    def needs(self, prompt: Prompt, answer: int, *, share: float = 1.0) -> int:
        """Peak bytes of a request; ``share``: as if its media had only so much of their area."""
        media = max((self._vision(item, share) for item in prompt.media), default=0)
        slots = self._model.media_places(prompt.input_ids, prompt.media)
        less = sum(len(places) for places in slots) * (1 - share)
        tokens = len(prompt) - less + min(answer, EXPECTED_ANSWER)
        return int(self._kv.token * tokens) + self._kv.fixed + media

    def check(self, prompt: Prompt, answer: int) -> int:
        """What the request needs; ``OutOfMemory`` for what can't be done even alone."""
        needs = self.needs(prompt, answer)
        if needs > self.free:
            raise OutOfMemory(
                f"the request needs {_gb(needs)} beside the model's {_gb(self.weights)}, and {_gb(self.limit)} may be "
                "used: take smaller pictures (max_pixels), a shorter prompt, --kv-bits, or a smaller model"
            )
        return needs

    def share(self, prompt: Prompt, answer: int) -> float:
        """How much of the media's area fits; 1.0 where everything does."""
        share = 1.0
        while share > SMALLEST_SHARE and self.needs(prompt, answer, share=share) > self.free:
            share *= 0.9
        return share

    def _vision(self, media: Media, share: float) -> int:
        return int(LIVE_BLOCKS * self._width * math.prod(media.grid) * share * self._itemsize)


def picture_size(media: Media) -> tuple[int, int]:
    """Width and height in which a picture or frame goes through the vision tower."""
    shape = media.patches.shape
    if len(shape) == 3:  # the original Qwen-VL: [3, S, S]
        return shape[2], shape[1]
    per_channel = shape[-1] // 3
    side = math.isqrt(per_channel)
    if side * side != per_channel:  # with its temporal copies
        side = math.isqrt(per_channel // 2)
    return media.grid[2] * side, media.grid[1] * side


def _vision_shape(tower: Any) -> tuple[int, int]:
    """Numbers that one block's linear layers give out for a patch, and bytes of a number."""
    if not isinstance(tower, nn.Module):
        return 0, 0
    blocks = {name: module for name, module in tower.named_modules() if name.endswith("blocks.0")}
    if not blocks:
        return 0, 0
    weights = [
        part.weight
        for part in next(iter(blocks.values())).modules()
        if "weight" in part and part.weight.ndim == 2
    ]
    itemsize = 4 if any(weight.dtype == mx.float32 for weight in weights) else 2
    return sum(weight.shape[0] for weight in weights), itemsize


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
