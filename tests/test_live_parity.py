"""Our numbers against those of transformers, live, on random models of every later generation.

Sizes differ from the goldens': heads of 80, ragged windows, other depths, vocabularies and expert counts.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.parity_table import (
    GENERATIONS,
    Pair,
    cases,
    ours,
    prompt,
    rows,
    single,
    torch_logits,
    torch_model,
)
from qwenvl_mlx.checkpoint import load_model
from qwenvl_mlx.media import Prompt

pytest.importorskip("torch")
pytest.importorskip("transformers")


def tolerance(generation: str) -> float:
    """float32: measured 1e-5; the delta net's state lets both sides' rounding grow: measured 5e-4."""
    return 1e-3 if generation.startswith("qwen3_5") else 1e-4


@pytest.fixture(scope="module", params=GENERATIONS)
def pair(request: pytest.FixtureRequest) -> Pair:
    reference = torch_model(request.param)
    return Pair(request.param, reference, ours(reference))


def test_float32_equals_torch(pair: Pair) -> None:
    for name, run in cases(pair.generation, pair.model):
        found, wanted = run(pair, pair.torch_model)
        worst = float(np.abs(found - wanted).max())
        print(f"{pair.generation} {name}: {worst:.1e}")
        assert worst < tolerance(pair.generation), name


def test_bfloat16_is_as_near_to_float32_as_torch_is(pair: Pair) -> None:
    import copy

    import torch

    picture = rows(pair.generation, (1, 6, 8), "image", 1)
    whole = prompt(pair.model, [5, picture, 9])
    half = ours(pair.torch_model, mx.bfloat16)
    rounded, wanted = single(Pair(pair.generation, pair.torch_model, half), pair.torch_model, whole)
    theirs = torch_logits(copy.deepcopy(pair.torch_model).to(torch.bfloat16), half, whole)
    mine, other = (float(np.sqrt(np.mean((x - wanted) ** 2))) for x in (rounded, theirs))
    print(f"{pair.generation}: ours {mine:.3f}, torch {other:.3f}")
    assert mine < 2 * other


def test_saved_by_transformers_loads_to_the_same_model(pair: Pair, tmp_path: Path) -> None:
    pair.torch_model.save_pretrained(tmp_path)
    whole = Prompt([3, 5, 7, 11, 13])
    loaded = load_model(tmp_path, dtype="float32").logits(whole)
    assert mx.array_equal(loaded, pair.model.logits(whole))


@pytest.mark.parametrize("generation", ["qwen2_vl", "qwen3_vl"])
def test_tied_output_layer(generation: str) -> None:
    reference = torch_model(generation, seed=1, tied=True)
    pair = Pair(generation, reference, ours(reference))
    found, wanted = single(pair, reference, Prompt([3, 5, 7, 11, 13]))
    assert np.abs(found - wanted).max() < tolerance(generation)
