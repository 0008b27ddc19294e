"""What travels between the stages: media and prompts in, features and embeddings on the way.

All are values. Nothing of a request is ever kept on a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from qwenvl_mlx.errors import MediaError, PromptError

Triple = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Media:
    """One picture or video, cut into patches.

    ``patches``: rows ``[n, C*T*p*p]`` in the reference processors' order, float32 and normalised, or uint8 to be
    normalised on the device by ``mean`` and ``std``. A still's rows may be ``[n, C*p*p]``: its temporal copies are
    implied. For the original Qwen-VL: the picture ``[3, S, S]``.
    ``grid``: ``(t, h, w)`` in patches before merging.
    ``seconds_per_grid``: time between temporal groups (Qwen2.5-VL). ``timestamps``: seconds of each temporal group
    (Qwen3-VL and later). ``source_size``: ``(width, height)`` of the picture as it was given, upright.
    """

    kind: Literal["image", "video"]
    patches: NDArray[np.float32] | NDArray[np.uint8] | mx.array
    grid: tuple[int, int, int]
    seconds_per_grid: float | None = None
    timestamps: tuple[float, ...] | None = None
    mean: Triple | None = None
    std: Triple | None = None
    source_size: tuple[int, int] | None = None
    digest: str = ""

    def __post_init__(self) -> None:
        """Arrays of any library are welcome; MLX takes shapes in Python's own integers only."""
        put = partial(object.__setattr__, self)
        put("grid", tuple(int(count) for count in self.grid))
        if self.kind not in ("image", "video") or len(self.grid) != 3:
            raise MediaError(
                f"media of kind {self.kind!r}, grid {self.grid}: give image or video, and (t, h, w)"
            )
        if not isinstance(self.patches, mx.array):
            put("patches", np.asarray(self.patches))
        if not self.digest:
            put("digest", self._content_digest())

    def _content_digest(self) -> str:
        about = f"{self.kind} {self.grid} {self.seconds_per_grid} {self.timestamps} {self.mean} {self.std}"
        rows = np.ascontiguousarray(np.array(self.patches))
        digest = hashlib.blake2b(about.encode(), digest_size=16)
        digest.update(f"{rows.shape} {rows.dtype}".encode())
        digest.update(rows.data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Prompt:
    """Token ids with every placeholder expanded, and the media in the order of their placeholders."""

    input_ids: list[int]
    media: list[Media] = field(default_factory=list)

    def __post_init__(self) -> None:
        ids = np.asarray(self.input_ids, np.int64)
        if ids.ndim != 1:
            raise PromptError(f"input_ids have the shape {ids.shape}: give one row of a batch")
        object.__setattr__(self, "input_ids", ids.tolist())
        object.__setattr__(self, "media", list(self.media))

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, eq=False)
class Features:
    """What the vision tower gives for one media item.

    ``embeddings``: ``[tokens, d]``; ``deepstack`` (Qwen3-VL): one ``[tokens, d]`` for each tap.
    """

    embeddings: mx.array
    deepstack: tuple[mx.array, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.embeddings, *self.deepstack))


@dataclass(frozen=True, eq=False)
class Embedded:
    """A prompt (or a slice of one) ready for the decoder.

    ``embeddings``: ``[B, L, d]``; ``positions``: int32 ``[3, L]``, or ``[3, B, L]`` for a left-padded batch;
    ``rope_delta``: what to add to the number of cached tokens to get the next position, int or int32 ``[B]``;
    ``deepstack``: per tap ``[B, L, d]``, zero where there is no media token;
    ``start``: index of the first token within its prompt; ``prompt_length``: tokens of the whole prompt.
    """

    embeddings: mx.array
    positions: mx.array
    rope_delta: int | mx.array = 0
    deepstack: tuple[mx.array, ...] = ()
    start: int = 0
    prompt_length: int = 0

    def __len__(self) -> int:
        return int(self.embeddings.shape[1])

    def slice(self, begin: int, end: int) -> Embedded:
        """Tokens ``begin`` to ``end`` of this piece: what one chunk of a prefill takes."""
        return replace(
            self,
            embeddings=self.embeddings[:, begin:end],
            positions=self.positions[..., begin:end],
            deepstack=tuple(tap[:, begin:end] for tap in self.deepstack),
            start=self.start + begin,
        )


def media_kinds(media: Sequence[Media]) -> str:
    """A short count for messages: ``2 images, 1 video``."""
    counts = {kind: sum(item.kind == kind for item in media) for kind in ("image", "video")}
    return ", ".join(f"{n} {kind}{'s' if n > 1 else ''}" for kind, n in counts.items() if n) or "no media"
