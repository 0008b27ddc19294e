"""A 12-megapixel photo to patches: our processor seconds next to transformers' Pillow processor, for each generation.

python -m benchmarks preprocess
"""

from __future__ import annotations

import importlib.util
import io
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.device import describe, peak_bytes, reset_peak
from qwenvl_mlx.processor.image import MEAN, STD, square_image
from qwenvl_mlx.processor.patches import image_media
from qwenvl_mlx.processor.rules import CLIP_MEAN, CLIP_STD, HALF, PatchRules

QWEN2 = PatchRules(14, 2, 2, 3136, 12845056, CLIP_MEAN, CLIP_STD)  # Qwen2-VL and Qwen2.5-VL as published
QWEN3 = PatchRules(16, 2, 2, 65536, 16777216, HALF, HALF)  # Qwen3-VL and Qwen3.5
RULES = {
    "Qwen2-VL, Qwen2.5-VL": QWEN2,
    "Qwen2.5-VL, 1,280 tokens at most": replace(QWEN2, max_pixels=1280 * 28 * 28),
    "Qwen3-VL, Qwen3.5": QWEN3,
}
SQUARE = 448  # of the original Qwen-VL
ROUNDS = 7

Seconds = dict[str, list[float]]


def measure() -> tuple[dict[str, Any], str]:
    """Report and Markdown table: processor seconds of all threads, and memory beyond the decoded photo."""
    encoded = _jpeg(4000, 3000)
    photo = _decoded(encoded)
    lines = ["| photo 4000x3000 | qwenvl-mlx, s | reference, s | ours is |", "|---|---|---|---|"]
    measured = {}
    for name, (mine, theirs) in _pairs(photo).items():
        seconds = measured[name] = _cpu_seconds({"qwenvl-mlx": mine, "reference": theirs})
        lines.append(f"| {name} | {_row(seconds)} |")
    decoding = _cpu_seconds({"decode": partial(_decoded, encoded)})["decode"]
    extra = _extra_bytes(photo)
    one, several = _wall(photo, 1), _wall(photo, 4)
    lines += [
        "",
        f"Decoding the JPEG, the same for both, takes {statistics.median(decoding):.3f} s more. "
        f"{extra / 1e6:.0f} MB beyond the decoded photo (Qwen2.5-VL). "
        f"Four at once: {several:.2f} s, one after the other {one:.2f} s ({os.cpu_count()} cores).",
    ]
    report = {
        "device": describe(),
        "seconds": measured,
        "decode": decoding,
        "bytes": extra,
        "four": several,
        "one": one,
    }
    return report, "\n".join(lines)


def _jpeg(width: int, height: int) -> bytes:
    small = np.random.default_rng(0).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def _decoded(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded)).convert("RGB")


def _pairs(photo: Image.Image) -> dict[str, tuple[Callable[[], object], Callable[[], object] | None]]:
    """For each set of rules: our run and the reference's, if that is installed."""
    pairs: dict[str, tuple[Callable[[], object], Callable[[], object] | None]] = {}
    for name, rules in RULES.items():
        theirs = _transformers(photo, rules) if importlib.util.find_spec("transformers") else None
        pairs[name] = (partial(image_media, photo, rules), theirs)
    original = partial(_original, photo) if importlib.util.find_spec("torch") else None
    pairs["Qwen-VL"] = (partial(square_image, photo, size=SQUARE, patch=14), original)
    return pairs


def rules_of(config: dict[str, Any]) -> PatchRules | None:
    """The published rules of a checkpoint's pictures; None for the original Qwen-VL's squares."""
    if config["model_type"] == "qwen":
        return None
    return QWEN3 if config["model_type"].startswith("qwen3") else QWEN2


def ours(photo: Image.Image, config: dict[str, Any]) -> object:
    """A decoded photo to what the model takes."""
    rules = rules_of(config)
    if rules is None:
        return square_image(photo, size=config["visual"]["image_size"], patch=config["visual"]["patch_size"])
    return image_media(photo, rules)


def reference(photo: Image.Image, config: dict[str, Any]) -> object:
    """The same by transformers, or Pillow and PyTorch."""
    rules = rules_of(config)
    return _original(photo) if rules is None else _transformers(photo, rules)()


def _transformers(photo: Image.Image, rules: PatchRules) -> Callable[[], object]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        min_pixels=rules.min_pixels,
        max_pixels=rules.max_pixels,
        patch_size=rules.patch_size,
        image_mean=list(rules.mean),
        image_std=list(rules.std),
    )
    return lambda: processor(photo, return_tensors="np")


def _original(photo: Image.Image) -> object:
    """What the original's pictures go through before its tower, by Pillow and PyTorch."""
    import torch

    square = photo.resize((SQUARE, SQUARE), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous().float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels - mean) / std


def _cpu_seconds(programs: dict[str, Callable[[], object] | None]) -> Seconds:
    """In turn, so that what else runs on the machine hits all alike; a first round warms up."""
    seconds: Seconds = {name: [] for name, run in programs.items() if run is not None}
    for _ in range(ROUNDS + 1):
        for name, run in programs.items():
            if run is not None:
                start = time.process_time()
                run()
                seconds[name].append(time.process_time() - start)
    return {name: samples[1:] for name, samples in seconds.items()}


def _row(seconds: Seconds) -> str:
    """Medians with their spread, and the median of the ratios of the same round."""
    cells = [f"{statistics.median(s):.3f} ({min(s):.3f} to {max(s):.3f})" for s in seconds.values()]
    if "reference" not in seconds:
        return " | ".join([*cells, "not installed", ""])
    ratios = [a / b for a, b in zip(seconds["qwenvl-mlx"], seconds["reference"], strict=True)]
    return " | ".join([*cells, f"×{statistics.median(ratios):.2f}"])


def _extra_bytes(photo: Image.Image) -> int:
    """Resident memory that the rows and what makes them need."""
    reset_peak()
    before = peak_bytes()
    image_media(photo, QWEN2)
    return peak_bytes() - before


def _wall(photo: Image.Image, workers: int) -> float:
    """Seconds for four photos."""
    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda _: image_media(photo, QWEN2), range(4)))
    return time.perf_counter() - start
