"""Find the processor of a checkpoint's generation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenvl_mlx.errors import ConfigError
from qwenvl_mlx.processor.base import Processor


def load_processor(folder: Path, config: Mapping[str, Any]) -> Processor:
    """The processor made of the files in ``folder``; ``config``: the content of its ``config.json``.

    Raises ``CheckpointError``, ``ConfigError``.
    """
    if config.get("model_type") == "qwen":
        from qwenvl_mlx.processor.qwen_vl import QwenVLProcessor

        return QwenVLProcessor.from_folder(folder, config)
    from qwenvl_mlx.processor.hf import GENERATIONS, HFProcessor

    if config.get("model_type") not in GENERATIONS:
        known = ", ".join(("qwen", *GENERATIONS))
        raise ConfigError(f"model_type {config.get('model_type')!r} has no processor here; known: {known}")
    return HFProcessor.from_folder(folder, config)
