"""Ready-made folders in the layout of mlx-community load unchanged and answer as they did where they were made."""

from __future__ import annotations

import numpy as np
import pytest
from golden import LAST, Case, batch, embedded, greedy, load, report, same_until_unclear
from helpers import reference

FOLDERS = {
    "q2-4bit": ("qwen2_vl", 1e-3),
    "q25-4bit": ("qwen2_5_vl", 1e-3),
    "q3-8bit": ("qwen3_vl", 1e-3),
    # the program that made this golden is itself 1.2e-3 away from PyTorch here; we are 2e-5 from PyTorch
    "q3moe-bf16": ("qwen3_vl_moe", 2e-3),
    "q35-bf16": ("qwen3_5", 1e-3),
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_loads_unchanged(folder: str) -> None:
    generation, tolerance = FOLDERS[folder]
    golden = np.load(reference(f"mlx_folders/{folder}/golden.npz"))
    model = load(f"mlx_folders/{folder}")
    for name in ("text", "image1"):
        prompt = Case.load(generation, name).prompts(model)[0]
        ready, cache = batch(model, [embedded(model, prompt)])
        logits = model(ready, cache)
        report(f"{folder} {name}", logits[:, -LAST:], golden[f"{name}/logits"], tolerance)
        tokens, steps = greedy(model, logits, cache, 32)
        assert same_until_unclear(tokens, golden[f"{name}/greedy"][None], steps)
