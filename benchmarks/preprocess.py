"""A 12-megapixel photo to rows of patches: our CPU time and memory next to transformers' Pillow processor.

python -m benchmarks preprocess
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.device import describe, peak_bytes, reset_peak
from qwenvl_mlx.processor.patches import image_media
from qwenvl_mlx.processor.rules import CLIP_MEAN, CLIP_STD, PatchRules

RULES = PatchRules(14, 2, 2, 3136, 12845056, CLIP_MEAN, CLIP_STD)  # those of Qwen2.5-VL as published
ROUNDS = 7


def measure() -> tuple[dict[str, Any], str]:
    """Report and Markdown table: processor seconds and memory beyond the decoded photo."""
    photo = _photo(4000, 3000)
    image_media(_photo(400, 300), RULES)  # what is loaded on first use is not the photo's
    reset_peak()
    before = peak_bytes()
    media = image_media(photo, RULES)
    extra = peak_bytes() - before
    grid = media.grid
    del media
    programs: dict[str, Callable[[], object]] = {"qwenvl-mlx": lambda: image_media(photo, RULES)}
    if importlib.util.find_spec("transformers"):
        programs["transformers (Pillow)"] = _reference(photo)
    seconds = _cpu_seconds(programs)
    mine = statistics.median(seconds["qwenvl-mlx"])
    lines = ["| photo 4000x3000 | processor s | spread | ours is |", "|---|---|---|---|"]
    for name, samples in seconds.items():
        median = statistics.median(samples)
        spread = f"{min(samples):.3f} to {max(samples):.3f}"
        lines.append(f"| {name} | {median:.3f} | {spread} | ×{mine / median:.2f} |")
    one, several = _wall(photo, 1), _wall(photo, 4)
    lines += [
        "",
        f"Grid {grid}; {extra / 1e6:.0f} MB beyond the decoded photo. "
        f"Four at once: {several:.2f} s, one after the other {4 * one:.2f} s ({os.cpu_count()} cores).",
    ]
    report = {"device": describe(), "seconds": seconds, "bytes": extra, "four": several, "one": one}
    return report, "\n".join(lines)


def _photo(width: int, height: int) -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def _reference(photo: Image.Image) -> Callable[[], object]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(min_pixels=RULES.min_pixels, max_pixels=RULES.max_pixels)
    return lambda: processor(photo, return_tensors="np")


def _cpu_seconds(programs: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """In turn, so that what else runs on the machine hits all alike; a first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(ROUNDS + 1):
        for name, run in programs.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return {name: samples[1:] for name, samples in seconds.items()}


def _wall(photo: Image.Image, count: int) -> float:
    start = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda _: image_media(photo, RULES), range(count)))
    return time.perf_counter() - start
