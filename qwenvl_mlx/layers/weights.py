"""Names and orientation of weights: from the layouts that are found on hubs to that of the MLX folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import mlx.core as mx

Weights = dict[str, mx.array]

# Old hub names, and those that transformers 5 has in memory. The first prefix that fits is replaced; the MLX names
# on the right begin with none of those on the left.
RENAMES = (
    ("model.visual.", "vision_tower."),
    ("visual.", "vision_tower."),
    ("model.language_model.", "language_model.model."),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
PATCH_EMBEDDING = "vision_tower.patch_embed.proj.weight"
OUTPUT = "language_model.lm_head."
PER_EXPERT = re.compile(r"(.*\.mlp)\.experts\.(\d+)\.(\w+)\.(\w+)")
FUSED = re.compile(r"(.*\.mlp)\.experts\.(gate_up_proj|down_proj)(?:\.weight)?")


def rename(name: str, renames: Sequence[tuple[str, str]] = RENAMES) -> str:
    """``name`` under its MLX prefix."""
    for old, new in renames:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def to_mlx_layout(weights: Mapping[str, mx.array], *, channels: int, tied: bool) -> Weights:
    """Rename, turn the patch embedding to ``(out, T, H, W, in)``, and drop what is not used at inference."""
    renamed = {
        rename(name): array
        for name, array in weights.items()
        if not name.startswith(("mtp.", "model.mtp.")) and not name.endswith(".inv_freq")
    }
    if tied:
        renamed = {name: array for name, array in renamed.items() if not name.startswith(OUTPUT)}
    patches = renamed.get(PATCH_EMBEDDING)
    if patches is not None and patches.ndim == 5 and patches.shape[1] == channels != patches.shape[-1]:
        renamed[PATCH_EMBEDDING] = patches.transpose(0, 2, 3, 4, 1)
    return renamed


def split_experts(weights: Mapping[str, mx.array], *, hidden: int, inner: int) -> Weights:
    """Experts under any layout -> ``switch_mlp.{gate,up,down}_proj``, ``[experts, outputs, inputs]``."""
    out: Weights = {}
    single: dict[str, dict[int, mx.array]] = {}
    for name, array in weights.items():
        if match := PER_EXPERT.fullmatch(name):
            layer, expert, projection, suffix = match.groups()
            single.setdefault(f"{layer}.switch_mlp.{projection}.{suffix}", {})[int(expert)] = array
        elif match := FUSED.fullmatch(name):
            layer, projection = match.groups()
            if _inputs_first(weights, name, hidden, inner):
                array = array.swapaxes(-1, -2)
            if projection == "down_proj":
                out[f"{layer}.switch_mlp.down_proj.weight"] = array
            else:
                gate, up = mx.split(array, 2, axis=-2)
                out[f"{layer}.switch_mlp.gate_proj.weight"] = gate
                out[f"{layer}.switch_mlp.up_proj.weight"] = up
        else:
            out[name] = array
    for name, experts in single.items():
        out[name] = mx.stack([experts[index] for index in sorted(experts)])
    return out


def _inputs_first(weights: Mapping[str, mx.array], name: str, hidden: int, inner: int) -> bool:
    """Whether fused experts are used as ``x @ W``. Told by the shapes of both tensors: one alone may be square."""
    both = (name, name.replace("gate_up_proj", "down_proj"), name.replace("down_proj", "gate_up_proj"))
    for tensor in both:
        inputs, outputs = (hidden, 2 * inner) if "gate_up_proj" in tensor else (inner, hidden)
        if tensor in weights and inputs != outputs:
            return bool(weights[tensor].shape[-2:] == (inputs, outputs))
    return False
