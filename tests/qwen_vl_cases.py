"""The goldens of the original Qwen-VL: loading, comparing, and recording stages of a model from outside."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from helpers import reference
from PIL import Image

from qwenvl_mlx.checkpoint import load_model
from qwenvl_mlx.media import Media, Prompt
from qwenvl_mlx.models.qwen_vl import PIXEL_MEAN, PIXEL_STD, Model

CHECKPOINTS = {"tiny_hd128": "tiny_hd128", "tiny_chat": "tiny_chat/safetensors_fp32"}
STRIDES = (1, 4, 8, 16, 64)  # the goldens keep every n-th row


def load(folder: str, dtype: str = "float32", **changes: Any) -> Model:
    """A tiny checkpoint by its golden's name, or by its folder; ``changes`` to its config.json."""
    source = reference(f"qwen_vl/ckpt/{CHECKPOINTS.get(folder, folder)}")
    with tempfile.TemporaryDirectory() as place:
        for path in source.iterdir():
            (Path(place) / path.name).symlink_to(path)
        config = Path(place) / "config.json"
        config.unlink()
        config.write_text(json.dumps(json.loads((source / "config.json").read_text()) | changes))
        model = load_model(place, dtype)
    assert isinstance(model, Model)
    return model


@cache
def goldens(name: str) -> dict[str, Any]:
    """All arrays of a file, nested by case: ``goldens("tiny_chat")["img1"]["logits"]``."""
    nested: dict[str, Any] = {}
    with np.load(reference(f"qwen_vl/goldens/model_{name}.npz")) as arrays:
        for key in arrays.files:
            case, stage = key.split("/", 1)
            nested.setdefault(case, {})[stage] = arrays[key]
    return nested


def prompt(model: Model, ids: Any) -> Prompt:
    """Token ids with the pictures that their slots name by path."""
    ids = [int(token) for token in ids]
    slots = model.vision.n_queries
    starts = [at + 1 for at, token in enumerate(ids) if token == model.vision.image_start_id]
    names = [bytes(token for token in ids[at : at + slots] if token < 256).decode() for at in starts]
    return Prompt(ids, [picture(name, model.vision.image_size) for name in names])


@cache
def picture(name: str, size: int) -> Media:
    with Image.open(reference(f"qwen_vl/images/{name}")) as image:
        return media(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def media(image: Image.Image) -> Media:
    """A resized picture, normalised: SPEC 3.3."""
    pixels = np.asarray(image, np.float32) / np.float32(255)
    pixels = (pixels - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)
    side = image.width // 14
    return Media("image", np.ascontiguousarray(pixels.transpose(2, 0, 1)), (1, side, side))


def difference(ours: mx.array, theirs: Any) -> float:
    """Largest absolute difference; the golden may hold every n-th row of axis -2."""
    mine = np.array(ours.astype(mx.float32))
    mine = mine.reshape(-1, *mine.shape[-2:])
    wanted = theirs.reshape(-1, *theirs.shape[-2:])
    rows, kept = mine.shape[1], wanted.shape[1]
    stride = next(step for step in STRIDES if math.ceil(rows / step) == kept)
    return float(np.abs(mine[:, ::stride] - wanted).max())


class Recorder:
    """Stands where a module stood and keeps what it gave."""

    def __init__(self, inner: Callable[..., mx.array]) -> None:
        self.inner = inner
        self.given: list[Any] = []
        self.made: list[mx.array] = []

    def __call__(self, *args: Any) -> mx.array:
        made = self.inner(*args)
        self.given.append(args[0])
        self.made.append(made)
        return made

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def record(module: nn.Module, *names: str) -> dict[str, Recorder]:
    """Put recorders in place of the named children."""
    recorders = {name: Recorder(getattr(module, name)) for name in names}
    for name, recorder in recorders.items():
        setattr(module, name, recorder)
    return recorders


def record_all(blocks: list[Any]) -> list[Recorder]:
    """Put recorders in place of every block of a list."""
    blocks[:] = [Recorder(block) for block in blocks]
    return blocks
