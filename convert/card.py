"""The model card: where the weights come from, under which licence, and what the conversion cost."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData, metadata_load

from qwenvl_mlx.convert.options import ConvertOptions
from qwenvl_mlx.convert.quality import Quality
from qwenvl_mlx.hub import HUB_NAME

log = logging.getLogger(__name__)

CARRIED = ("license", "license_name", "license_link", "language")


def card(name: str, source: Path, result: str, options: ConvertOptions, quality: Quality) -> str:
    """``README.md``; ``name``: what the source is called, ``source``: its folder, ``result``: what this one will be."""
    title = name.rpartition("/")[2].partition("@")[0]
    return "\n".join(
        (
            f"---\n{_metadata(name, source).to_yaml()}\n---\n",
            f"# {title}, for MLX\n",
            f"Converted from {_link(name)} with `python -m qwenvl_mlx.convert`: {_form(options)}.\n",
            "```bash",
            "pip install qwenvl-mlx",
            f"python -m qwenvl_mlx.generate --model {result} --image photo.jpg --prompt 'What is this?'",
            "```\n",
            _table(quality),
        )
    )


def _metadata(name: str, source: Path) -> ModelCardData:
    """What the source's card says of licence and languages, and what is new."""
    stated = source_metadata(source)
    carried: dict[str, Any] = {key: stated[key] for key in CARRIED if key in stated}
    base = name.partition("@")[0] if _is_hub_name(name) else stated.get("base_model")
    return ModelCardData(
        library_name="mlx",
        pipeline_tag="image-text-to-text",
        tags=["mlx", "qwenvl-mlx"],
        base_model=base,
        **carried,
    )


def source_metadata(source: Path) -> Mapping[str, Any]:
    """The front matter of the source's ``README.md``; empty where there is none that can be read."""
    readme = source / "README.md"
    if not readme.exists():
        return {}
    try:
        return metadata_load(readme) or {}
    except (yaml.YAMLError, ValueError) as error:
        log.warning(
            "the licence is not carried over: %s has a front matter that can't be read (%s)", readme, error
        )
        return {}


def _is_hub_name(name: str) -> bool:
    return HUB_NAME.fullmatch(name) is not None


def _link(name: str) -> str:
    bare = name.partition("@")[0]
    return f"[{name}](https://huggingface.co/{bare})" if _is_hub_name(name) else f"`{name}`"


def _form(options: ConvertOptions) -> str:
    parts = []
    if options.quantise:
        settings = options.quantise
        parts.append(
            f"{settings.bits} bits in groups of {settings.group_size} ({settings.mode}, {options.recipe})"
        )
    if options.calibrate:
        parts.append("rounded by GPTQ on texts and pictures")
    if options.vision_bits:
        parts.append(f"vision tower at {options.vision_bits} bits")
    if options.dequantise:
        parts.append("dequantised")
    if options.dtype:
        parts.append(f"{options.dtype} elsewhere" if parts else options.dtype)
    return ", ".join(parts) or "values as in the source"


def _table(quality: Quality) -> str:
    rows = "".join(f"| {what} | {value} |\n" for what, value in quality.rows())
    note = f"\n({quality.note})\n" if quality.note else ""
    return f"| | |\n|---|---|\n{rows}{note}"
