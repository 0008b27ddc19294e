"""What is measured: a picture of a size and a prompt of a length, as arrays that every program takes alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True)
class Case:
    """A picture ``(width, height)`` or none, text tokens around it, and how many tokens are decoded.

    ``batch``: how many such prompts are answered at once; without a picture.
    """

    name: str
    picture: tuple[int, int] | None
    text: int
    new_tokens: int
    batch: int = 1


CASES = (
    Case("text 64", None, 64, 32),
    Case("text 1024", None, 1024, 32),
    Case("batch 8", None, 64, 16, batch=8),
    Case("picture 448x448", (448, 448), 64, 32),
    Case("picture 1344x1008", (1344, 1008), 64, 16),
)


@dataclass(frozen=True)
class Inputs:
    """``ids`` int64 ``[L]``; ``rows`` float32 ``[patches, C*T*p*p]``, ``grid`` (t, h, w); None without picture.

    Of the original Qwen-VL ``rows`` are a picture ``[3, S, S]``. ``photo``: a picture that is only preprocessed.
    """

    ids: NDArray[np.int64]
    rows: NDArray[np.float32] | None = None
    grid: tuple[int, int, int] | None = None
    photo: Image.Image | None = None


def inputs(case: Case, config: dict[str, Any], seed: int = 0) -> Inputs:
    """Random tokens and patches that fit ``config``."""
    random = np.random.default_rng(seed)
    if config["model_type"] == "qwen":
        return _original(case, config, random)
    text = config.get("text_config", config)
    vision = config["vision_config"]
    special = [config[key] for key in ("image_token_id", "video_token_id", "vision_start_token_id")]
    words = random.choice(np.setdiff1d(np.arange(text["vocab_size"]), special), case.text)
    if case.picture is None:
        return Inputs(words)
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
    return Inputs(ids, rows, grid, _photo(case, random))


def _original(case: Case, config: dict[str, Any], random: np.random.Generator) -> Inputs:
    """Its pictures are of one size and take 256 slots, which begin with the bytes of a path."""
    start, side = config["visual"]["image_start_id"], config["visual"]["image_size"]
    words = random.integers(300, min(config["vocab_size"], start), case.text)
    if case.picture is None:
        return Inputs(words)
    patches = side // config["visual"]["patch_size"]
    media = [start, ord("x"), *[start + 2] * (config["visual"].get("n_queries", 256) - 1), start + 1]
    ids = np.array([*words[:8], *media, *words[8:]], dtype=np.int64)
    rows = random.standard_normal((3, side, side), dtype=np.float32)
    return Inputs(ids, rows, (1, patches, patches), _photo(case, random))


def _photo(case: Case, random: np.random.Generator) -> Image.Image:
    assert case.picture is not None
    width, height = case.picture
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
