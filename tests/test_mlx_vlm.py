"""What we convert loads in mlx-vlm, where that is installed, and gives the same numbers there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from golden import LAST, Case, embedded, report
from helpers import reference
from mlx.utils import tree_map

from qwenvl_mlx.checkpoint import load_model
from qwenvl_mlx.convert.__main__ import main as convert
from qwenvl_mlx.models.mrope import MRopeModel

pytestmark = pytest.mark.filterwarnings("ignore")
FOLDERS = {
    "qwen2_vl": "tiny-hub",
    "qwen2_5_vl": "tiny-hub",
    "qwen3_vl": "tiny",
    "qwen3_vl_moe": "tiny-hub",
    "qwen3_5": "tiny",
    "qwen3_5_moe": "tiny-hub",
}


def theirs(folder: Path, case: Case) -> Any:
    """mlx-vlm's logits, with activations in float32 as ours."""
    utils = pytest.importorskip("mlx_vlm.utils")
    model = utils.load_model(folder)
    wide = tree_map(
        lambda x: x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x, model.parameters()
    )
    model.update(wide)
    grids = {"image_grid_thw": mx.array(case["image_grid_thw"])} if "image_grid_thw" in case else {}
    pixels = mx.array(case["pixel_values"]) if "pixel_values" in case else None
    mask = mx.array(case["attention_mask"])
    return model(mx.array(case["input_ids"]), pixels, mask=mask, **grids).logits[:, -LAST:]


@pytest.mark.parametrize("generation", FOLDERS)
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["-q", "--q-bits", "4", "--q-group-size", "32"],
        ["-q", "--q-group-size", "32", "--q-recipe", "mixed", "--q-vision"],
    ],
    ids=["plain", "4-bit", "mixed"],
)
def test_what_we_convert_loads_in_mlx_vlm(generation: str, options: list[str], tmp_path: Path) -> None:
    pytest.importorskip("mlx_vlm")
    source = reference(f"{generation}/{FOLDERS[generation]}")
    folder = tmp_path / "mlx"
    assert convert(["--hf-path", str(source), "--mlx-path", str(folder), *options]) == 0
    model = load_model(folder, dtype="float32")
    assert isinstance(model, MRopeModel)
    for name in ("text", "image1"):
        case = Case.load(generation, name)
        ours = model(embedded(model, case.prompts(model)[0]))[:, -LAST:]
        # its MoE of Qwen3-VL is itself 1.2e-3 away from PyTorch on pictures
        report(f"{generation} {name}", ours, np.array(theirs(folder, case)), 2e-3)
