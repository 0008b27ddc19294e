"""The reference side of ``verify``: the same ids and patches through PyTorch. Imports torch and transformers late."""

from __future__ import annotations

import contextlib
import importlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwenvl_mlx.errors import CheckpointError, GenerationError
from qwenvl_mlx.media import Media, Prompt
from qwenvl_mlx.models.base import Places
from qwenvl_mlx.models.qwen_vl import PIXEL_MEAN, PIXEL_STD
from qwenvl_mlx.parity import KEPT, Stages

FLAGS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}  # of the original Qwen-VL's config.json


def run_transformers(
    folder: Path, prompt: Prompt, places: Sequence[Places], tokens: list[int], dtype: str
) -> Stages:
    """Qwen2-VL and later, by the classes of transformers. ``tokens`` follow the prompt, all in one forward pass."""
    torch = importlib.import_module("torch")
    reference = _pretrained("AutoModelForImageTextToText", folder, dtype=getattr(torch, dtype))
    core = reference.model.language_model
    inputs = _inputs(torch, reference, prompt, places, tokens, dtype)
    return _run(torch, reference, (core.layers, core.norm), inputs, len(prompt), tokens)


def run_hub_code(
    folder: Path, prompt: Prompt, places: Sequence[Places], tokens: list[int], dtype: str
) -> Stages:
    """The original Qwen-VL, by the Python files in its folder, which read pictures by the path in the prompt."""
    torch = importlib.import_module("torch")
    options = {"trust_remote_code": True, "torch_dtype": getattr(torch, dtype), FLAGS[dtype]: True}
    reference = _pretrained("AutoModelForCausalLM", folder, **options)
    core = reference.transformer
    with tempfile.TemporaryDirectory(prefix="qwen") as place:
        ids = torch.tensor([_with_paths(prompt, places, Path(place)) + tokens])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        return _run(torch, reference, (core.h, core.ln_f), inputs, len(prompt), tokens)


def _pretrained(auto: str, folder: Path, **options: Any) -> Any:
    cls = getattr(importlib.import_module("transformers"), auto)
    try:
        return cls.from_pretrained(str(folder), **options).eval()
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise CheckpointError(f"PyTorch can't load {folder}: {error}") from error


def _run(
    torch: Any, reference: Any, parts: tuple[Any, Any], inputs: Any, length: int, tokens: list[int]
) -> Stages:
    layers, norm = parts
    with torch.no_grad(), _tapped([*layers, norm]) as seen:
        logits = reference(**inputs).logits
    states = [state[0, :length].float().numpy() for state in seen]
    kept = logits[0, max(length - KEPT, 0) : length + len(tokens)]
    return Stages(states, kept.float().numpy(), tokens)


@contextlib.contextmanager
def _tapped(modules: Sequence[Any]) -> Iterator[list[Any]]:
    """While this lasts, the list collects the hidden states that enter these modules."""
    seen: list[Any] = []

    def keep(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        seen.append((args[0] if args else options["hidden_states"]).detach())

    hooks = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _inputs(
    torch: Any,
    reference: Any,
    prompt: Prompt,
    places: Sequence[Places],
    tokens: list[int],
    dtype: str,
) -> dict[str, Any]:
    ids = torch.tensor([prompt.input_ids + tokens])
    kinds = np.zeros(ids.shape, np.int64)  # 0 text, 1 picture, 2 video
    for item, place in zip(prompt.media, places, strict=True):
        kinds[0, place] = 2 if item.kind == "video" else 1
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    inputs["mm_token_type_ids"] = torch.tensor(kinds)
    vision = reference.config.vision_config
    for kind, pixels, grid in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        items = [item for item in prompt.media if item.kind == kind]
        if items:
            rows = np.concatenate([_rows(item, vision) for item in items])
            inputs[pixels] = torch.tensor(rows).to(getattr(torch, dtype))
            inputs[grid] = torch.tensor([item.grid for item in items])
    seconds = [item.seconds_per_grid for item in prompt.media if item.seconds_per_grid is not None]
    if seconds:
        inputs["second_per_grid_ts"] = torch.tensor(seconds)
    return inputs


def _rows(item: Media, vision: Any) -> NDArray[np.float32]:
    """Patches as the reference's processor gives them: normalised, a still's temporal copies written out."""
    rows = np.array(item.patches)
    channels = getattr(vision, "in_channels", 3)
    area = vision.patch_size**2
    rows = rows.reshape(len(rows), channels, -1, area)  # [patches, channels, frames, patch]
    if rows.dtype == np.uint8 and item.mean and item.std:
        mean, std = (np.array(value, np.float32)[:, None, None] for value in (item.mean, item.std))
        rows = (rows.astype(np.float32) / 255 - mean) / std
    rows = np.repeat(rows, vision.temporal_patch_size // rows.shape[2], axis=2)
    return np.ascontiguousarray(rows.reshape(len(rows), -1), np.float32)


def _with_paths(prompt: Prompt, places: Sequence[Places], folder: Path) -> list[int]:
    """The prompt's ids, the slots of each picture filled with the bytes of a path where it is written to."""
    from PIL import Image

    ids = list(prompt.input_ids)
    for index, (item, slots) in enumerate(zip(prompt.media, places, strict=True)):
        path = folder / f"{index}.png"
        Image.fromarray(_picture(item)).save(path)
        content = list(str(path).encode())
        if len(content) > len(slots) - 2:
            raise GenerationError(
                f"{folder} is too long a path for the original Qwen-VL: set TMPDIR to a short one"
            )
        pad = ids[slots[0] - 1] + 2  # <img> is followed by </img> and <imgpad>
        ids[slots[0] : slots[-1] + 1] = content + [pad] * (len(slots) - len(content))
    return ids


def _picture(item: Media) -> NDArray[np.uint8]:
    """``[3, S, S]``, normalised or not -> ``[S, S, 3]`` bytes: exact, since they were bytes before."""
    pixels = np.array(item.patches)
    if pixels.dtype != np.uint8:
        mean, std = (
            np.array(value)[:, None, None] for value in (item.mean or PIXEL_MEAN, item.std or PIXEL_STD)
        )
        pixels = np.rint((pixels * std + mean) * 255).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))
