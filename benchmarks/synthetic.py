"""Random checkpoints with true shapes, so that anyone can time a model without downloading it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwenvl_mlx.sizes import SIZES, small_shapes


def shape(name: str) -> dict[str, Any]:
    """The ``config.json`` of a published size (``qwen2.5-vl-3b``) or of a small one (``qwen3-vl-250m``)."""
    known = {**{key.lower(): config for key, config in SIZES.items()}, **small_shapes()}
    if name.lower() not in known:
        raise SystemExit(f"no shape named {name}; known: {', '.join(known)}")
    return known[name.lower()]


def checkpoint(name: str, folder: Path, *, for_torch: bool) -> Path:
    """Write a random checkpoint of that shape: for every program through transformers, else MLX's layout alone."""
    folder = folder / name.lower()
    folder.mkdir(parents=True, exist_ok=True)
    config = shape(name)
    if for_torch and config["model_type"] != "qwen":
        _through_transformers(config, folder)
    else:
        write_mlx(config, folder)
    return folder


def _through_transformers(config: dict[str, Any], folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    values = {key: value for key, value in config.items() if key != "model_type"}
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(config["model_type"], **values))
    model.save_pretrained(folder, max_shard_size="2GB")
    (folder / "config.json").write_text(
        json.dumps(config)
    )  # as the hub has it, not as transformers rewrites it


def write_mlx(config: dict[str, Any], folder: Path) -> None:
    """Random weights in MLX's layout."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from qwenvl_mlx.models import model_class

    mx.random.seed(0)
    parameters = dict(tree_flatten(model_class(config)(config).parameters()))
    for index, name in enumerate(sorted(parameters)):  # a file each: the whole never stands in memory
        array = parameters.pop(name).astype(mx.bfloat16)
        mx.save_safetensors(
            str(folder / f"model-{index:05d}.safetensors"), {name: array}, metadata={"format": "mlx"}
        )
    (folder / "config.json").write_text(json.dumps(config))
