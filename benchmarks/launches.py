"""Kernels launched by every generation, at real depths with narrow weights, kept in ``launches.json``.

Depth decides the number of kernels and width does not, so a model as deep as the published one but 64 wide counts
the same and is built in a moment. A test compares with the file: a slower graph is a failing test.

    python -m benchmarks.launches                 # counts anew and writes the file: when a graph has become faster
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from benchmarks.cases import Case, inputs
from benchmarks.counts import Cost, count, metal_view
from qwenvl_mlx.engine.step import CompiledStep, Decoding
from qwenvl_mlx.layers.cache import Cache
from qwenvl_mlx.media import Media
from qwenvl_mlx.models import model_class
from qwenvl_mlx.sizes import SIZES

KEPT = Path(__file__).parent / "launches.json"
NAMES = ("Qwen-VL-Chat", "Qwen2-VL-7B", "Qwen2.5-VL-7B", "Qwen3-VL-8B", "Qwen3-VL-30B-A3B", "Qwen3.5-27B")
PICTURES = ((448, 448), (1024, 1024))

PROMPT = [1, 2, 3, 4] * 16

Counts = dict[str, dict[str, dict[str, int]]]  # generation -> what -> launches, bytes


def narrow(config: dict[str, Any]) -> dict[str, Any]:
    """The same depth and head sizes, two heads wide and with a small vocabulary."""
    config = copy.deepcopy(config)
    if config["model_type"] == "qwen":
        config.update(hidden_size=256, num_attention_heads=2, intermediate_size=256, vocab_size=640)
        config["visual"].update(width=208, heads=2, mlp_ratio=1.0, output_dim=256, image_start_id=634)
        return config
    text, vision = config.get("text_config", config), config["vision_config"]
    text.setdefault("head_dim", 128)
    text.update(
        hidden_size=2 * text["head_dim"], num_attention_heads=2, num_key_value_heads=1, vocab_size=320
    )
    text.update({key: 64 for key in ("intermediate_size", "moe_intermediate_size") if key in text})
    text.update({key: 64 for key in ("shared_expert_intermediate_size",) if key in text})
    text.update({key: 4 for key in ("num_experts", "num_experts_per_tok") if key in text})
    text.update({key: 1 for key in ("linear_num_key_heads", "linear_num_value_heads") if key in text})
    width = vision["embed_dim"] if "embed_dim" in vision else vision["hidden_size"]
    head = width // vision["num_heads"]
    vision["embed_dim" if "embed_dim" in vision else "hidden_size"] = 2 * head
    vision["num_heads"] = 2
    if "embed_dim" in vision:
        vision["hidden_size"] = text["hidden_size"]
    else:
        vision.update(intermediate_size=64, out_hidden_size=text["hidden_size"])
    config.update(image_token_id=300, video_token_id=301, vision_start_token_id=302, vision_end_token_id=303)
    return config


def _picture(config: dict[str, Any], size: tuple[int, int]) -> Media:
    if config["model_type"] == "qwen":
        side = config["visual"]["image_size"]
        patches = side // config["visual"]["patch_size"]
        return Media("image", mx.zeros((3, side, side)), (1, patches, patches))
    given = inputs(Case("", size, 16, 1), config)
    assert given.rows is not None
    assert given.grid is not None
    return Media("image", given.rows, given.grid)


def built(config: dict[str, Any], *, bits: int | None) -> tuple[Any, Cache]:
    """A bfloat16 model and a cache of a few tokens, computed in float32: not all kernels have half types on a CPU."""
    model = model_class(config)(config)
    if bits:

        def matrices(path: str, module: nn.Module) -> bool:
            return path.startswith("language_model") and hasattr(module, "to_quantized")

        nn.quantize(model, group_size=64, bits=bits, class_predicate=matrices)
    cache = model.make_cache()
    mx.eval(model(model.embed(PROMPT, [], []), cache=cache, last_only=True), cache.arrays)
    model.set_dtype(mx.bfloat16)
    model.prepare()
    model.set_dtype(mx.bfloat16, lambda dtype: dtype == mx.float32)  # experts, which a CPU keeps so
    for layer in cache:
        layer.state = tree_map(_half, layer.state)
    mx.eval(model.parameters(), cache.arrays)
    return model, cache


def _half(value: Any) -> Any:
    floating = isinstance(value, mx.array) and value.dtype == mx.float32
    return value.astype(mx.bfloat16) if floating else value


def measure(names: Sequence[str] = NAMES) -> Counts:
    """For each generation: a decoded token, called directly and compiled, and a slice of a prompt (bf16 and 4 bits);
    pictures of two sizes.
    """
    return {name: _measure(narrow(SIZES[name])) for name in names}


def _measure(config: dict[str, Any]) -> dict[str, Any]:
    row = {}
    with metal_view():
        for label, bits in (("bf16", None), ("4 bits", 4)):
            model, cache = built(config, bits=bits)
            row[f"decode {label}"] = _decode(model, cache)
            row[f"compiled {label}"] = compiled(model, cache)
            row[f"prefill {label}"] = prefill(model, cache, PROMPT)
        for size in PICTURES:
            row[f"picture {size[0]}x{size[1]}"] = vision(model, _picture(config, size))
    return {what: {"launches": cost.launches, "bytes": cost.bytes_moved} for what, cost in row.items()}


def _decode(model: Any, cache: Cache) -> Cost:
    def step(tokens: mx.array) -> Any:
        state = copy.deepcopy(cache)
        return model.decode(tokens, state), state.arrays

    return count(step, mx.array([[5]]))


def compiled(model: Any, cache: Cache) -> Cost:
    """The same token as a compiled step, which the engine takes where a sequence decodes alone."""
    step = CompiledStep(model)
    decoding = Decoding(step, copy.deepcopy(cache))
    return count(lambda tokens: step.compiled(tokens, *decoding.inputs), mx.array([[5]]))


def prefill(model: Any, cache: Cache, tokens: Sequence[int]) -> Cost:
    """A slice of a prompt after what is cached."""
    embedded = model.embed(tokens, [], [])

    def run(embeddings: mx.array) -> Any:
        state = copy.deepcopy(cache)
        inputs = dataclasses.replace(embedded, embeddings=embeddings)
        return model(inputs, cache=state, last_only=True), state.arrays

    mx.eval(embedded.embeddings)
    return count(run, embedded.embeddings)


def vision(model: Any, media: Media) -> Cost:
    rows = mx.array(media.patches)
    mx.eval(rows)

    def run(rows: mx.array) -> Any:
        features = model.encode([dataclasses.replace(media, patches=rows)])[0]
        return features.embeddings, features.deepstack

    return count(run, rows)


def table(counts: Counts) -> str:
    """Markdown: launches, also for a decoder layer and a vision block at the published depth."""
    columns = list(next(iter(counts.values())))
    lines = [
        f"| kernels launched | {' | '.join(columns)} | a layer, bf16 | a layer, 4 bits | a vision block |",
        "|---" * (len(columns) + 4) + "|",
    ]
    for name, row in counts.items():
        layers, blocks = depths(name)
        launches = {what: cost["launches"] for what, cost in row.items()}
        cells = [str(launches[column]) for column in columns]
        cells += [f"{launches[f'decode {kind}'] / layers:.1f}" for kind in ("bf16", "4 bits")]
        cells.append(f"{launches[columns[-1]] / blocks:.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def depths(name: str) -> tuple[int, int]:
    """Decoder layers and vision blocks of a published size."""
    config = SIZES[name]
    vision = config.get("vision_config") or config["visual"]
    return config.get("text_config", config)["num_hidden_layers"], vision.get("depth", vision.get("layers"))


def kept() -> Counts:
    """The counts that the project stands by."""
    return json.loads(KEPT.read_text())  # type: ignore[no-any-return]


if __name__ == "__main__":
    measured = measure()
    KEPT.write_text(json.dumps(measured, indent=1) + "\n")
    print(table(measured))
