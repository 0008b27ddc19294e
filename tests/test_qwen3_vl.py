"""Qwen3-VL computes what the PyTorch code computes, stage by stage."""

from __future__ import annotations

import pytest
from golden import Case, check_case, check_second_turn, check_stages, load

from qwenvl_mlx.models.mrope import MRopeModel

GENERATION = "qwen3_vl"
CASES = (
    "text",
    "image1",
    "image3",
    "video",
    "video_flat",
    "image_video",
    "video_image_video",
    "batch_text",
    "batch_mixed",
)
STAGES = ("image1", "image3", "video", "video_flat", "image_video", "video_image_video")
TOLERANCE = 1e-4  # float32; measured 5e-5 at most


@pytest.fixture(scope="module")
def model() -> MRopeModel:
    return load(f"{GENERATION}/tiny")


@pytest.mark.parametrize("name", CASES)
def test_positions_logits_and_greedy_tokens(model: MRopeModel, name: str) -> None:
    check_case(model, Case.load(GENERATION, name), TOLERANCE)


@pytest.mark.parametrize("name", STAGES)
def test_every_block_and_layer(model: MRopeModel, name: str) -> None:
    check_stages(model, Case.load(GENERATION, name), TOLERANCE)


def test_second_turn_continues_the_cache(model: MRopeModel) -> None:
    check_second_turn(model, Case.load(GENERATION, "multiturn"), TOLERANCE)
