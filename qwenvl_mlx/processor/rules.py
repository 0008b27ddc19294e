"""How a checkpoint wants pictures and videos cut, as its processor files say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwenvl_mlx.config import one_of, read_json
from qwenvl_mlx.errors import ConfigError
from qwenvl_mlx.media import Triple

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
FIXED = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3}  # 3: bicubic


@dataclass(frozen=True)
class PatchRules:
    """Sizes in pixels; ``min_pixels`` and ``max_pixels`` are areas after resizing."""

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int
    mean: Triple
    std: Triple

    @property
    def factor(self) -> int:
        """What both sides of a resized picture are multiples of: the side of one merged token."""
        return self.patch_size * self.merge_size

    def limited(self, *, min_pixels: int | None = None, max_pixels: int | None = None) -> PatchRules:
        """These rules with a request's limits. Where only one is given and they would cross, it moves the other."""
        low = self.min_pixels if min_pixels is None else min_pixels
        high = self.max_pixels if max_pixels is None else max_pixels
        if min_pixels is None:
            low = min(low, high)
        elif max_pixels is None:
            high = max(low, high)
        return replace(self, min_pixels=low, max_pixels=high)


@dataclass(frozen=True)
class VideoRules:
    """``cut``: the rules of one frame, or, where ``timed`` (Qwen3-VL and later), of all frames together.

    ``fps``: frames a second taken from a file; ``min_frames`` to ``max_frames`` of them.
    """

    cut: PatchRules
    timed: bool
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768


def read_rules(folder: Path, config: Mapping[str, Any], *, timed: bool) -> tuple[PatchRules, VideoRules]:
    """Rules for pictures and for videos. ``timed``: the generation is Qwen3-VL or later.

    ``processor_config.json`` (the nested form of transformers 5) comes before ``preprocessor_config.json`` and
    ``video_preprocessor_config.json``, and the picture's rules stand in for missing video rules, as in transformers.
    """
    nested = _optional(folder / "processor_config.json")
    picture = nested.get("image_processor") or _optional(folder / "preprocessor_config.json")
    video = nested.get("video_processor") or _optional(folder / "video_preprocessor_config.json") or picture
    vision = config.get("vision_config") or {}
    cut = _patch_rules(picture, vision, _limits(timed=timed, video=False), timed=timed)
    moving = _patch_rules(video, vision, _limits(timed=timed, video=True), timed=timed)
    sampling = {key: video[key] for key in ("fps", "min_frames", "max_frames") if video.get(key) is not None}
    return cut, VideoRules(moving, timed, **sampling)


def _limits(*, timed: bool, video: bool) -> tuple[int, int]:
    """The areas that hold where no file says any: the classes' own, or the published ones of Qwen3-VL."""
    if timed:
        return (4096, 25165824) if video else (65536, 16777216)
    return (128 * 28 * 28, 768 * 28 * 28) if video else (56 * 56, 1280 * 28 * 28)


def _patch_rules(
    raw: Mapping[str, Any], vision: Mapping[str, Any], limits: tuple[int, int], *, timed: bool
) -> PatchRules:
    for key, value in FIXED.items():
        one_of(raw.get(key, value), [value], key=key, where="the processor's configuration")
    size = raw.get("size") or {}  # its "edges" are areas
    low, high = size.get("shortest_edge") or limits[0], size.get("longest_edge") or limits[1]
    mean, std = (HALF, HALF) if timed else (CLIP_MEAN, CLIP_STD)
    return PatchRules(
        patch_size=_agreed(raw, "patch_size", vision, "patch_size", 16 if timed else 14),
        merge_size=_agreed(raw, "merge_size", vision, "spatial_merge_size", 2),
        temporal_patch_size=_agreed(raw, "temporal_patch_size", vision, "temporal_patch_size", 2),
        min_pixels=int(raw.get("min_pixels") or size.get("min_pixels") or low),
        max_pixels=int(raw.get("max_pixels") or size.get("max_pixels") or high),
        mean=_triple(raw.get("image_mean") or mean),
        std=_triple(raw.get("image_std") or std),
    )


def _agreed(raw: Mapping[str, Any], key: str, vision: Mapping[str, Any], name: str, default: int) -> int:
    """A size that the processor's files and config.json must agree on."""
    wanted = vision.get(name, raw.get(key, default))
    if raw.get(key, wanted) != wanted:
        raise ConfigError(
            f"the processor's {key} is {raw[key]} but config.json has {name} {wanted}: "
            "take both files from the same checkpoint"
        )
    return int(wanted)


def _triple(values: Any) -> Triple:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
