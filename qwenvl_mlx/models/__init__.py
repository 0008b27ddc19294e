"""The generations: one file each, found by ``model_type``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from qwenvl_mlx.errors import ConfigError
from qwenvl_mlx.models.base import VisionLanguageModel

GENERATIONS = {
    "qwen": "qwen_vl",
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl_moe",
    "qwen3_5": "qwen3_5",
    "qwen3_5_moe": "qwen3_5",
}


def model_class(config: Mapping[str, Any]) -> type[VisionLanguageModel]:
    """The class that runs the checkpoint with this ``config.json``; ``ConfigError`` if none does."""
    kind = config.get("model_type")
    if kind not in GENERATIONS:
        known = ", ".join(GENERATIONS)
        raise ConfigError(f"model_type {kind!r} is not a Qwen vision-language model; known: {known}")
    module = importlib.import_module(f"qwenvl_mlx.models.{GENERATIONS[kind]}")
    cls: type[VisionLanguageModel] = module.Model
    return cls
