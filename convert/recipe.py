"""Decide for each module of a model whether and how it is quantised."""

from __future__ import annotations

import re
from collections.abc import Mapping

import mlx.nn as nn

from qwenvl_mlx.convert.options import GROUP_SIZES, ConvertOptions, Settings

LAYER = re.compile(r"\blayers\.(\d+)\.|\bh\.(\d+)\.")
DOWN_PROJECTIONS = ("mlp.down_proj", "mlp.c_proj", "mlp.switch_mlp.down_proj", "mlp.shared_expert.down_proj")
ROUTERS = ("mlp.gate", "mlp.shared_expert_gate")
ROUTER_BITS = 8
VISION = "vision_tower."
HIGH_BITS = {"mixed": 8, "mixed_6": 6}  # what the sensitive modules of a recipe get

Recipe = dict[str, Settings]


def quantisable(model: nn.Module) -> dict[str, int]:
    """Path -> number of input features, of every module that MLX can quantise.

    The vision tower's embeddings are tables of positions, added once to each patch: they stay as they are.
    """
    modules: dict[str, int] = {}
    for path, module in model.named_modules():
        if hasattr(module, "to_quantized") and "weight" in module:
            if path.startswith(VISION) and isinstance(module, nn.Embedding):
                continue
            modules[path] = module.weight.shape[-1]
    return modules


def make_recipe(modules: Mapping[str, int], options: ConvertOptions) -> Recipe:
    """Settings of the modules to quantise; ``modules`` as from ``quantisable``."""
    layers = 1 + max((_layer(path) for path in modules if not path.startswith(VISION)), default=-1)
    head = next((path for path in modules if path.endswith("lm_head")), None)
    recipe = {}
    for path, inputs in modules.items():
        if path.startswith(VISION):
            settings = _vision(inputs, options)
        else:
            sensitive = _sensitive(path, layers, tied=head is None)
            settings = _decoder(path, inputs, options, sensitive=sensitive)
        if settings is not None:
            recipe[path] = settings
    return recipe


def _decoder(path: str, inputs: int, options: ConvertOptions, *, sensitive: bool) -> Settings | None:
    settings = options.quantise
    if settings is None:
        return None
    if path.endswith(ROUTERS) and settings.bits < ROUTER_BITS:
        settings = _affine(ROUTER_BITS, settings.group_size, inputs)
    elif sensitive and settings.bits < HIGH_BITS.get(options.recipe, 0):
        settings = _affine(HIGH_BITS[options.recipe], settings.group_size, inputs)
    return settings if settings is not None and inputs % settings.group_size == 0 else None


def _vision(inputs: int, options: ConvertOptions) -> Settings | None:
    if options.vision_bits is None:
        return None
    wanted = options.quantise.group_size if options.quantise else 64
    return _affine(options.vision_bits, wanted, inputs)


def _affine(bits: int, group_size: int, inputs: int) -> Settings | None:
    """Affine settings with the wanted group size, or the largest other one that divides ``inputs``."""
    sizes = [
        size for size in (group_size, *reversed(GROUP_SIZES)) if size in GROUP_SIZES and inputs % size == 0
    ]
    return Settings(bits, sizes[0]) if sizes else None


def _sensitive(path: str, layers: int, *, tied: bool) -> bool:
    """Modules whose errors reach the logits most directly: the ends of the decoder, and what writes to its stream."""
    layer = _layer(path)
    if layer < 0:
        return path.endswith("lm_head") or tied
    edge = max(1, layers // 8)
    return layer < edge or layer >= layers - edge or path.endswith(DOWN_PROJECTIONS)


def _layer(path: str) -> int:
    match = LAYER.search(path)
    return int(match[1] or match[2]) if match else -1
