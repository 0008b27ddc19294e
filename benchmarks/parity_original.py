"""The original Qwen-VL's line of the parity table, from files: its own PyTorch code was run once, no package has it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from qwenvl_mlx.checkpoint import load_model
from qwenvl_mlx.layers.batch import left_pad
from qwenvl_mlx.media import Prompt
from qwenvl_mlx.models.qwen_vl import Model
from qwenvl_mlx.processor.image import square_image

FILES = Path(__file__).parent.parent / "tests/data/qwen_vl"
PICTURES = {"text": "text", "one picture": "img1", "several": "img2"}


@dataclass(frozen=True)
class Cell:
    """Largest difference in float32; error of our bfloat16 and of PyTorch's. None: there is no such case."""

    exact: float | None = None
    rounded: tuple[float, float] | None = None

    @property
    def single(self) -> str:
        return "–" if self.exact is None else f"{self.exact:.0e}"

    @property
    def half(self) -> str:
        return "–" if self.rounded is None else "{:.3f}/{:.3f}".format(*self.rounded)


Row = dict[str, Cell]


def largest(ours: Any, theirs: Any) -> float:
    """The largest difference."""
    return float(np.abs(ours - theirs).max())


def spread(ours: Any, theirs: Any) -> float:
    """The root mean square of the differences."""
    return float(np.sqrt(np.mean((ours - theirs) ** 2)))


def measure() -> Row:
    """Every case that the files hold."""
    model = _load("ckpt/tiny_hd128", "float32")
    golden, halves = (np.load(FILES / f"goldens/model_tiny_{name}.npz") for name in ("hd128", "chat_bf16"))
    half = _load("ckpt/tiny_chat/bin_bf16", "bfloat16")
    row = {}
    for name, case in PICTURES.items():
        wanted = golden[f"{case}/logits"]
        found = _numpy(model.logits(_prompt(model, golden[f"{case}/ids"][0])))[:, -wanted.shape[1] :]
        exact = halves[f"{case}/bf16weights_f32compute/logits_last4"]
        rounded = _numpy(half.logits(_prompt(half, halves[f"{case}/ids"][0])))[:, -4:]
        theirs = halves[f"{case}/native_bf16/logits_last4"]
        row[name] = Cell(largest(found, wanted), (spread(rounded, exact), spread(theirs, exact)))
    row["second turn"] = Cell(_second_turn(model, golden["img2/ids"][0], golden["img2/logits"]))
    row["padded batch"] = Cell(_padded(model, golden["batch_leftpad/ids"], golden["batch_leftpad/mask"],
                                       golden["batch_leftpad/logits"]))  # fmt: skip
    row["cached decode"] = Cell(_cached(model, golden["img1/ids"][0], golden["img1/decode_ids"],
                                        golden["img1/decode_logits"]))  # fmt: skip
    return row


def _second_turn(model: Model, ids: Any, wanted: Any) -> float:
    """A prompt with two pictures in two pieces, each picture in its own: the second continues the first's cache."""
    whole = _prompt(model, ids)
    cut = int(np.flatnonzero(ids == model.vision.image_start_id)[1]) - 1
    cache = model.make_cache()
    for begin, end, picture in ((0, cut, whole.media[:1]), (cut, len(whole), whole.media[1:])):
        piece = whole.input_ids[begin:end]
        logits = model(model.embed(piece, model.encode(picture), picture), cache)
    return largest(_numpy(logits)[:, -wanted.shape[1] :], wanted)


def _padded(model: Model, ids: Any, mask: Any, wanted: Any) -> float:
    prompts = [_prompt(model, row[kept > 0]) for row, kept in zip(ids, mask, strict=True)]
    rows = [model.embed(one.input_ids, model.encode(one.media), one.media) for one in prompts]
    batch, cache = left_pad(rows, model.make_cache())
    return largest(_numpy(model(batch, cache))[:, -wanted.shape[1] :], wanted)


def _cached(model: Model, ids: Any, tokens: Any, wanted: Any) -> float:
    one, cache = _prompt(model, ids), model.make_cache()
    model(model.embed(one.input_ids, model.encode(one.media), one.media), cache)
    steps = [model.decode(mx.array(tokens[:, at : at + 1]), cache) for at in range(tokens.shape[1])]
    return largest(_numpy(mx.concatenate(steps, axis=1)), wanted)


def _load(folder: str, dtype: str) -> Model:
    model = load_model(FILES / folder, dtype=dtype)
    assert isinstance(model, Model)
    return model


def _prompt(model: Model, ids: Any) -> Prompt:
    """Token ids with the pictures whose paths stand in their slots."""
    vision, ids = model.vision, ids.tolist()
    media = []
    for start in (at + 1 for at, token in enumerate(ids) if token == vision.image_start_id):
        name = bytes(token for token in ids[start : start + vision.n_queries] if token < 256).decode()
        with Image.open(FILES / "images" / name) as image:
            media.append(square_image(image.convert("RGB"), size=vision.image_size, patch=vision.patch_size))
    return Prompt(ids, media)


def _numpy(logits: mx.array) -> Any:
    return np.array(logits.astype(mx.float32))
