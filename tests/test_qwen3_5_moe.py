"""Qwen3.5 MoE: experts beside a shared one compute what the PyTorch code computes."""

from __future__ import annotations

import pytest
from golden import Case, check_case, check_stages, load

from qwenvl_mlx.models.mrope import MRopeModel

GENERATION = "qwen3_5_moe"
TOLERANCE = 1e-3  # float32; measured 8e-5


@pytest.fixture(scope="module")
def model() -> MRopeModel:
    return load(f"{GENERATION}/tiny-hub")


@pytest.mark.parametrize("name", ["text", "image1", "image3", "batch_mixed"])
def test_positions_logits_and_greedy_tokens(model: MRopeModel, name: str) -> None:
    check_case(model, Case.load(GENERATION, name), TOLERANCE)


@pytest.mark.parametrize("name", ["image1", "image3"])
def test_every_block_and_layer(model: MRopeModel, name: str) -> None:
    check_stages(model, Case.load(GENERATION, name), TOLERANCE)
