"""What every stage of a model gave for a prompt, in MLX or from a file: the material that ``verify`` compares."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from qwenvl_mlx.errors import CheckpointError
from qwenvl_mlx.media import Media, Prompt
from qwenvl_mlx.models.base import VisionLanguageModel

Floats = NDArray[np.float32]
KEPT = 32  # rows of the prompt's logits: a vocabulary of 150,000 makes more of them heavy


@dataclass(frozen=True, eq=False)
class Stages:
    """``states``: the hidden states ``[L, d]`` that enter each decoder layer, at last those that enter the final
    norm. ``logits``: of the prompt's last ``KEPT`` tokens and of every token of ``tokens``, which follow the prompt.
    """

    states: list[Floats]
    logits: Floats
    tokens: list[int]


class _Tap:
    """Stands in a module's place and keeps what comes in."""

    def __init__(self, inner: Any, seen: list[mx.array]) -> None:
        self._inner, self._seen = inner, seen

    def __call__(self, x: mx.array, *args: Any, **options: Any) -> Any:
        self._seen.append(x)
        return self._inner(x, *args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@contextlib.contextmanager
def tapped(model: VisionLanguageModel) -> Iterator[list[mx.array]]:
    """While this lasts, the list collects the inputs of every decoder layer and of the final norm."""
    decoder = model.language_model.model
    blocks, norm = (decoder.h, "ln_f") if "h" in decoder else (decoder.layers, "norm")
    before, last = list(blocks), decoder[norm]
    seen: list[mx.array] = []
    blocks[:] = [_Tap(block, seen) for block in before]
    decoder[norm] = _Tap(last, seen)
    try:
        yield seen
    finally:
        blocks[:], decoder[norm] = before, last


def run_mlx(model: VisionLanguageModel, prompt: Prompt, follow: int | list[int]) -> Stages:
    """Run a prompt; then decode, with the cache, so many greedy tokens, or these tokens."""
    features = []
    for item in prompt.media:
        features += model.encode([item])
        mx.eval(features[-1].embeddings, features[-1].deepstack)
    embedded = model.embed(prompt.input_ids, features, prompt.media)
    cache = model.make_cache()
    with tapped(model) as states:
        rows = model(embedded, cache)[0, -KEPT:]
        mx.eval(rows, states, cache.arrays)
    given = follow if isinstance(follow, list) else [None] * follow
    logits, tokens = [_host(rows)], []
    for token in given:
        tokens.append(int(logits[-1][-1].argmax()) if token is None else token)
        logits.append(_host(model.decode(mx.array([tokens[-1:]]), cache)[0]))
    return Stages([_host(state[0]) for state in states], np.concatenate(logits), tokens)


def _host(array: mx.array) -> Floats:
    return np.array(array.astype(mx.float32))


def write_golden(path: Path, prompt: Prompt, stages: Stages) -> None:
    """Keep a prompt, its media and what the reference gave for them, as ``.npz``."""
    arrays: dict[str, Any] = {
        "input_ids": np.array(prompt.input_ids),
        "tokens": np.array(stages.tokens),
        "states": np.stack(stages.states),
        "logits": stages.logits,
    }
    for index, item in enumerate(prompt.media):
        arrays |= {f"media{index}.{name}": value for name, value in _media_arrays(item).items()}
    with path.open("xb") as file:
        np.savez_compressed(file, **arrays)


def _media_arrays(item: Media) -> dict[str, Any]:
    about = {
        "mean": item.mean,
        "std": item.std,
        "timestamps": item.timestamps,
        "seconds": item.seconds_per_grid,
    }
    found = {name: np.array(value) for name, value in about.items() if value is not None}
    return {
        "patches": np.array(item.patches),
        "grid": np.array(item.grid),
        "kind": np.array(item.kind),
    } | found


def read_golden(path: Path) -> tuple[Prompt, Stages]:
    """What ``write_golden`` wrote; ``CheckpointError`` for anything else."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            stored = {name: arrays[name] for name in arrays.files}
        count = len({name.partition(".")[0] for name in stored if name.startswith("media")})
        media = [_media(stored, f"media{index}.") for index in range(count)]
        stages = Stages(list(stored["states"]), stored["logits"], stored["tokens"].tolist())
        return Prompt(stored["input_ids"].tolist(), media), stages
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: check --golden") from None
    except (OSError, EOFError, ValueError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} was not written by verify --save ({error}): make it again") from error


def _media(stored: dict[str, Any], prefix: str) -> Media:
    def listed(name: str) -> Any:
        value = stored.get(prefix + name)
        return None if value is None else tuple(value.tolist())

    seconds = stored.get(prefix + "seconds")
    return Media(
        kind=str(stored[prefix + "kind"]),  # type: ignore[arg-type]
        patches=stored[prefix + "patches"],
        grid=listed("grid"),
        seconds_per_grid=None if seconds is None else float(seconds),
        timestamps=listed("timestamps"),
        mean=listed("mean"),
        std=listed("std"),
    )
