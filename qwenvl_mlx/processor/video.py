"""Turn videos into rows of patches: choose frames, cut them one at a time, say when each was seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from qwenvl_mlx.errors import MediaError
from qwenvl_mlx.media import Media
from qwenvl_mlx.processor.frames import Frames, ShortVideo
from qwenvl_mlx.processor.patches import allocate, cut, media_of, smart_resize
from qwenvl_mlx.processor.rules import VideoRules

UNKNOWN_FPS = 24.0


def video_media(
    frames: Frames, rules: VideoRules, *, count: int | None = None, max_tokens: int | None = None
) -> Media:
    """A video as bytes ``[t*gh*gw, 3*T*p*p]``, an odd last frame repeated.

    ``count``: take so many frames instead of going by ``rules.fps``. ``max_tokens``: more than these is a
    ``MediaError``, raised before the frames are cut; so is a video that can't be read.
    """
    if frames.total < 1:
        raise MediaError(f"{frames.name} has no frames: give a video that has some")
    fps = frames.fps or UNKNOWN_FPS
    indices = list(range(frames.total)) if frames.sampled else sample(frames.total, fps, rules, count=count)
    try:
        return _cut(frames, indices, fps, rules, max_tokens)
    except ShortVideo as short:
        if not short.frames < frames.total:
            raise MediaError(f"{frames.name} can't be decoded: convert it to MP4") from short
        return video_media(frames.shortened(short.frames), rules, count=count, max_tokens=max_tokens)


def sample(total: int, fps: float, rules: VideoRules, *, count: int | None = None) -> list[int]:
    """Which of ``total`` frames at ``fps`` a second to take, by the rule of the generation."""
    wanted = total / fps * rules.fps
    if rules.timed:
        number = count or min(max(int(wanted), rules.min_frames), rules.max_frames, total)
        return [int(index) for index in np.linspace(0, total - 1, number).round()]
    number = 2 * round(count / 2) if count else 2 * math.floor(_clamped(wanted, total, rules) / 2)
    if number > total:
        raise MediaError(f"{number} frames are wanted but the video has {total}: ask for fewer")
    step = total / max(number, 1)
    return [int(np.float32(step * index)) for index in range(max(number, 1))]  # float32: as in the reference


def _clamped(wanted: float, total: int, rules: VideoRules) -> float:
    return min(max(wanted, rules.min_frames), 2 * (min(rules.max_frames, total) // 2))


def _cut(frames: Frames, indices: list[int], fps: float, rules: VideoRules, max_tokens: int | None) -> Media:
    pictures = frames.take(indices)
    picture = next(pictures)
    source_size = picture.size
    height, width = smart_resize(
        picture.height,
        picture.width,
        factor=rules.cut.factor,
        min_pixels=rules.cut.min_pixels,
        max_pixels=rules.cut.max_pixels,
        frames=len(indices) if rules.timed else None,
    )
    together = rules.cut.temporal_patch_size
    groups = math.ceil(len(indices) / together)
    _check_tokens(frames, len(indices), groups * height * width // rules.cut.factor**2, max_tokens)
    rows = allocate((groups, height, width), rules.cut, copies=together)
    cut(picture, rows[0, ..., 0, :, :], (width, height))
    for position, picture in enumerate(pictures, start=1):
        cut(picture, rows[position // together, ..., position % together, :, :], (width, height))
    for position in range(len(indices), groups * together):
        rows[-1, ..., position % together, :, :] = rows[-1, ..., (len(indices) - 1) % together, :, :]
    seconds = together / (len(indices) / frames.total * fps)
    return media_of(
        "video",
        rows,
        rules.cut,
        source_size=source_size,
        seconds_per_grid=None if rules.timed else seconds,
        timestamps=_times(indices, fps, together) if rules.timed else None,
    )


def _times(indices: Sequence[int], fps: float, together: int) -> tuple[float, ...]:
    """For each group the mean of the times of its first and last frame, in seconds."""
    last = len(indices) - 1
    ends = [(indices[i], indices[min(i + together - 1, last)]) for i in range(0, len(indices), together)]
    return tuple((first / fps + final / fps) / 2 for first, final in ends)


def _check_tokens(frames: Frames, number: int, tokens: int, max_tokens: int | None) -> None:
    if max_tokens is not None and tokens > max_tokens:
        raise MediaError(
            f"{frames.name}: {number} frames make {tokens} tokens but the model takes {max_tokens}: "
            "lower fps, max_frames or max_pixels"
        )


def with_request(
    rules: VideoRules,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
) -> VideoRules:
    """``rules`` with what a request asks for."""
    most = rules.max_frames if max_frames is None else max_frames
    return replace(
        rules,
        cut=rules.cut.limited(min_pixels=min_pixels, max_pixels=max_pixels),
        fps=rules.fps if fps is None else fps,
        max_frames=most,
        min_frames=min(rules.min_frames, most),
    )
