"""Questions with known answers that lie beside a checkpoint: how well source and result know them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import mlx.core as mx

from qwenvl_mlx.checkpoint import load_model
from qwenvl_mlx.media import Prompt
from qwenvl_mlx.processor.base import Processor

FILE = Path("samples") / "answers.json"


@dataclass(frozen=True)
class Known:
    """Over ``words`` tokens of true answers: mean log-likelihood, and the share that the model itself would say."""

    likelihood: float
    accuracy: float
    words: int


def known_answers(folder: Path, processor: Processor) -> list[tuple[Prompt, int]]:
    """Prompts that end with the true answer, each with its length; none where the folder has no such file."""
    if not (folder / FILE).is_file():
        return []
    made = []
    for row in json.loads((folder / FILE).read_text(encoding="utf-8")):
        parts = [
            {"type": "image", "image": str((folder / FILE).with_name(row["image"]))},
            {"type": "text", "text": row["question"]},
        ]
        asked = processor([{"role": "user", "content": parts}])
        answer = processor.raw(row["answer"]).input_ids
        made.append((Prompt([*asked.input_ids, *answer], asked.media), len(answer)))
    return made


def know(folder: Path, asked: list[tuple[Prompt, int]], dtype: str | None) -> Known:
    """Read the true answers with the model of ``folder``."""
    model = load_model(folder, dtype)
    likelihood, right, words = 0.0, 0, 0
    for prompt, length in asked:
        logits = model.logits(prompt)[0, -length - 1 : -1].astype(mx.float32)
        told = mx.array(prompt.input_ids[-length:])
        chosen = mx.take_along_axis(logits, told[:, None], axis=-1)[:, 0] - mx.logsumexp(logits, axis=-1)
        likelihood += cast(float, mx.sum(chosen).item())
        right += cast(int, mx.sum(mx.argmax(logits, axis=-1) == told).item())
        words += length
    return Known(round(likelihood / words, 6), round(right / words, 6), words)
