"""The conversion from its first check to the finished folder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qwenvl_mlx import __version__, hub
from qwenvl_mlx.checkpoint.files import read_config
from qwenvl_mlx.checkpoint.writing import write_json, write_shards, write_text
from qwenvl_mlx.convert.calibrate import calibrate
from qwenvl_mlx.convert.card import card
from qwenvl_mlx.convert.carry import carry_over, checksums
from qwenvl_mlx.convert.folder import check_space, finished_folder, refuse_existing
from qwenvl_mlx.convert.options import ConvertOptions, Settings, make_options
from qwenvl_mlx.convert.probes import calibration
from qwenvl_mlx.convert.quality import Quality, measure
from qwenvl_mlx.convert.recipe import Recipe
from qwenvl_mlx.convert.transform import Plan, Stream, make_plan
from qwenvl_mlx.processor.load import load_processor

REMOTE_CODE = "auto_map"  # names Python files, which are neither carried over nor ever run


@dataclass(frozen=True)
class Result:
    """The finished folder, and what the conversion cost."""

    folder: Path
    quality: Quality


def convert(
    hf_path: str | os.PathLike[str],
    mlx_path: str | os.PathLike[str] = "mlx_model",
    *,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str = "affine",
    q_recipe: str = "uniform",
    q_vision: int | bool | None = None,
    q_report: str = "auto",
    q_calibrate: bool | str | os.PathLike[str] = False,
    dtype: str | None = None,
    dequantize: bool = False,
    revision: str | None = None,
    upload_repo: str | None = None,
) -> Result:
    """Convert the checkpoint ``hf_path`` (folder or hub name) into the MLX folder ``mlx_path``.

    ``quantize`` with ``q_bits`` (4), ``q_group_size`` (64), ``q_mode`` and ``q_recipe``; ``q_vision``: bits of the
    vision tower's linear layers (True: 8). ``dtype``: type of what is not quantised, None as stored. ``dequantize``:
    turn quantised modules into floating point. ``q_report``: whether source and result are loaded and compared
    ("full": where they fit memory; "auto": small ones; "weights": never). ``q_calibrate``: quantise by GPTQ on built-in
    texts and pictures (True) or those of a JSON file. ``upload_repo``: upload the result to this
    Hugging Face repository. The folder appears only when it is complete. Raises ``HubError``, ``ConfigError``,
    ``CheckpointError`` and ``OutputError``.
    """
    options = make_options(
        quantize=quantize,
        q_bits=q_bits,
        q_group_size=q_group_size,
        q_mode=q_mode,
        q_recipe=q_recipe,
        q_vision=q_vision,
        q_report=q_report,
        q_calibrate=bool(q_calibrate),
        dtype=dtype,
        dequantize=dequantize,
    )
    target = Path(mlx_path).expanduser()
    refuse_existing(target)
    source = hub.resolve(hf_path, revision=revision)
    name = source.resolve().name if Path(hf_path).expanduser().is_dir() else str(hf_path)
    plan = make_plan(source, read_config(source), options)
    with finished_folder(target) as folder:
        if q_calibrate:
            plan = _calibrated(plan, source, None if q_calibrate is True else Path(q_calibrate))
        quality = write_folder(plan, source, folder, name=name, result=upload_repo or "THIS_FOLDER")
    if upload_repo:
        hub.upload(target, upload_repo)
    return Result(target, quality)


def _calibrated(plan: Plan, source: Path, file: Path | None) -> Plan:
    prompts = list(calibration(load_processor(source, plan.config), file))
    return dataclasses.replace(plan, calibrated=calibrate(plan, source, prompts))


def write_folder(plan: Plan, source: Path, folder: Path, *, name: str, result: str) -> Quality:
    """Write everything that an MLX folder has; ``name`` and ``result``: what source and result are called."""
    total = sum(outline.nbytes for outline in plan.outlines.values())
    check_space(folder, total)
    stream = Stream(plan)
    with (
        checksums((source / "config.json", *plan.source.files.paths)) as sums,
        tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=None) as bar,
    ):
        write_shards(folder, plan.outlines, stream.fetch, done=bar.update)
        inputs = sums()
    write_json(folder / "config.json", output_config(plan.config, plan.recipe, plan.options))
    carry_over(source, folder)
    provenance = {
        "source": name,
        "qwenvl_mlx": __version__,
        "options": plan.options.as_dict(),
        "sha256": inputs,
    }
    write_json(folder / "qwenvl_mlx.json", provenance)
    quality = measure(plan, source, folder, stream.errors)
    write_json(folder / "quality.json", quality.as_dict(plan))
    write_text(folder / "README.md", card(name, source, result, plan.options, quality))
    return quality


def output_config(config: Mapping[str, Any], recipe: Recipe, options: ConvertOptions) -> dict[str, Any]:
    """``config.json`` of the result: the source's, with what is quantised now under both customary keys."""
    result = {
        key: value
        for key, value in config.items()
        if key not in ("quantization", "quantization_config", REMOTE_CODE)
    }
    if options.dtype:
        result = _with_dtype(result, options.dtype)
    if recipe:
        result["quantization"] = result["quantization_config"] = quantization(recipe)
    return result


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The same configuration, also of its parts, with this type of weights wherever one is named."""
    result = dict(config)
    for key, value in config.items():
        if key in ("torch_dtype", "dtype"):
            result[key] = dtype
        elif isinstance(value, Mapping):
            result[key] = _with_dtype(value, dtype)
    return result


def quantization(recipe: Recipe) -> dict[str, Any]:
    """The settings that most modules have, and by their paths those of the others."""
    counts: dict[Settings, int] = {}
    for settings in recipe.values():
        counts[settings] = counts.get(settings, 0) + 1
    usual = max(counts, key=lambda settings: counts[settings])
    others = {path: settings.as_dict() for path, settings in sorted(recipe.items()) if settings != usual}
    return usual.as_dict() | others
