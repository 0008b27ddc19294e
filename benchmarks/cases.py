"""What is measured: a picture of a size and a prompt of a length, as arrays that every program takes alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Case:
    """A picture ``(width, height)`` or none, text tokens around it, and how many tokens are decoded."""

    name: str
    picture: tuple[int, int] | None
    text: int
    new_tokens: int


CASES = (
    Case("text 64", None, 64, 32),
    Case("text 1024", None, 1024, 32),
    Case("picture 448x448", (448, 448), 64, 32),
    Case("picture 1344x1008", (1344, 1008), 64, 16),
)


@dataclass(frozen=True)
class Inputs:
    """``ids`` int64 ``[L]``; ``rows`` float32 ``[patches, C*T*p*p]``, ``grid`` (t, h, w); None without picture."""

    ids: NDArray[np.int64]
    rows: NDArray[np.float32] | None
    grid: tuple[int, int, int] | None


def inputs(case: Case, config: dict[str, Any], seed: int = 0) -> Inputs:
    """Random tokens and patches that fit ``config``."""
    random = np.random.default_rng(seed)
    text = config.get("text_config", config)
    vision = config["vision_config"]
    special = [config[key] for key in ("image_token_id", "video_token_id", "vision_start_token_id")]
    limit = min(text["vocab_size"], *special)
    words = random.integers(10, limit, case.text)
    if case.picture is None:
        return Inputs(words, None, None)
    patch, merge = vision["patch_size"], vision["spatial_merge_size"]
    side = patch * merge
    width, height = (max(side, round(length / side) * side) for length in case.picture)
    grid = (1, height // patch, width // patch)
    patches = grid[1] * grid[2]
    channels = vision.get("in_channels", vision.get("in_chans", 3))
    size = channels * vision["temporal_patch_size"] * patch * patch
    rows = random.standard_normal((patches, size), dtype=np.float32)
    placeholders = [config["image_token_id"]] * (patches // merge**2)
    media = [config["vision_start_token_id"], *placeholders, config["vision_end_token_id"]]
    ids = np.array([*words[:8], *media, *words[8:]], dtype=np.int64)
    return Inputs(ids, rows, grid)
