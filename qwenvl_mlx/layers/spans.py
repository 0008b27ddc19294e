"""Where a prompt's media stand, and the rotary positions that follow from it (M-RoPE)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwenvl_mlx.errors import PromptError
from qwenvl_mlx.media import Media, media_kinds

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Placeholders:
    """How a generation writes media into a prompt.

    ``image``, ``video``: ids of the placeholder tokens. ``merge``: patches a side that one token stands for.
    ``frame_spans``: each temporal group of a video has a span of its own, with text between (Qwen3-VL and later).
    ``ticks_per_second``: of the temporal axis (Qwen2.5-VL); None where groups simply count.
    """

    image: int
    video: int
    merge: int
    frame_spans: bool = False
    ticks_per_second: float | None = None

    def tokens(self, media: Media) -> int:
        """Placeholder tokens of one media item."""
        t, h, w = media.grid
        return t * (h // self.merge) * (w // self.merge)

    def find(self, input_ids: Sequence[int], media: Sequence[Media]) -> list[Ints]:
        """For each media item, the indices of its tokens. ``PromptError`` where prompt and media disagree."""
        ids = np.asarray(input_ids, np.int64)
        places: dict[str, Ints] = {
            "image": np.flatnonzero(ids == self.image),
            "video": np.flatnonzero(ids == self.video),
        }
        found = []
        for kind, indices in places.items():
            wanted = sum(self.tokens(item) for item in media if item.kind == kind)
            if wanted != len(indices):
                raise PromptError(
                    f"the prompt has {len(indices)} {kind} placeholder tokens, but its media "
                    f"({media_kinds(media)}) need {wanted}: expand each placeholder to the media's tokens"
                )
        used = {"image": 0, "video": 0}
        for item in media:
            begin, count = used[item.kind], self.tokens(item)
            found.append(places[item.kind][begin : begin + count])
            used[item.kind] += count
        return found

    def positions(
        self, input_ids: Sequence[int], media: Sequence[Media]
    ) -> tuple[np.ndarray[Any, np.dtype[np.int32]], int]:
        """Positions int32 ``[3, L]`` and the rope delta: next position - tokens.

        Text counts up by one on all axes. A span of media starts where the text stopped; the text after it goes on
        at the largest position of all three axes + 1, as the checkpoints were trained.
        """
        steps = np.ones(len(input_ids), np.int64)
        local = np.zeros((3, len(input_ids)), np.int64)
        for item, indices in zip(media, self.find(input_ids, media), strict=True):
            offsets = self._offsets(item)
            groups = item.grid[0] if self.frame_spans else 1
            spans = indices.reshape(groups, -1)
            _require_whole(item, spans)
            local[:, indices] = offsets
            steps[indices] = 0
            steps[spans[:, -1]] = offsets.reshape(3, groups, -1).max((0, 2)) + 1
        positions = np.cumsum(steps) - steps + local
        total = int(steps.sum())
        return positions.astype(np.int32), total - len(input_ids)

    def _offsets(self, media: Media) -> Ints:
        """Positions of the tokens within their span, ``[3, tokens]``."""
        t, h, w = media.grid
        offsets = np.indices((t, h // self.merge, w // self.merge)).reshape(3, -1)
        if self.frame_spans:
            offsets[0] = 0  # the time stands in the text
        elif media.kind == "video" and self.ticks_per_second is not None:
            seconds = np.float32(1.0 if media.seconds_per_grid is None else media.seconds_per_grid)
            # float32 and this order of products: the reference truncates what they give
            offsets[0] = (
                offsets[0].astype(np.float32) * (seconds * np.float32(self.ticks_per_second))
            ).astype(int)
        return offsets


def _require_whole(media: Media, spans: Ints) -> None:
    """Tokens of one span follow each other: text inside would belong nowhere."""
    if spans.size and (spans[:, -1] - spans[:, 0] != spans.shape[1] - 1).any():
        raise PromptError(
            f"text stands between the placeholder tokens of one {media.kind} span: keep them together"
        )
