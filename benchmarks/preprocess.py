"""A 12-megapixel photo to rows of patches: our CPU time and memory next to transformers' Pillow processor.

python -m benchmarks.preprocess
"""

from __future__ import annotations

import importlib.util
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from qwenvl_mlx.processor.patches import image_media
from qwenvl_mlx.processor.rules import CLIP_MEAN, CLIP_STD, PatchRules

RULES = PatchRules(14, 2, 2, 3136, 12845056, CLIP_MEAN, CLIP_STD)  # those of Qwen2.5-VL as published
ROUNDS = 7


def main(argv: Sequence[str] | None = None) -> int:
    del argv  # there is nothing to choose
    photo = _photo(4000, 3000)
    image_media(_photo(400, 300), RULES)  # what is loaded on first use is not the photo's
    before = _peak()
    media = image_media(photo, RULES)
    extra = _peak() - before
    print(
        f"photo {photo.width}x{photo.height} -> grid {media.grid}, rows {media.patches.nbytes / 1e6:.1f} MB"
    )
    print(f"memory beyond the decoded photo: {extra / 1e6:.1f} MB")
    del media
    programs: dict[str, Callable[[], object]] = {"qwenvl-mlx": lambda: image_media(photo, RULES)}
    if importlib.util.find_spec("transformers"):
        programs["transformers (Pillow)"] = _reference(photo)
    seconds = _cpu_seconds(programs)
    for name, samples in seconds.items():
        spread = f"{min(samples):.3f} to {max(samples):.3f}"
        print(f"{name}: {statistics.median(samples):.3f} s of CPU (median of {ROUNDS}, {spread})")
    if len(seconds) > 1:
        ours, theirs = (statistics.median(samples) for samples in seconds.values())
        print(f"ratio: {ours / theirs:.2f}")
    one, several = _wall(photo, 1), _wall(photo, 4)
    print(f"4 photos at once: {several:.2f} s, one after the other {4 * one:.2f} s ({os.cpu_count()} cores)")
    return 0


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


def _peak() -> int:
    """The most bytes this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    sys.exit(main())
