"""Kernels launched by every generation, at real depths with narrow weights, kept in ``launches.json``.

Depth decides the number of kernels and width does not, so a model as deep as the published one but 64 wide counts
the same and is built in a moment. A test compares with the file: a slower graph is a failing test.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from benchmarks.cases import Case, inputs
from benchmarks.counts import count, metal_view
from qwenvl_mlx.layers.cache import Cache
from qwenvl_mlx.media import Media
from qwenvl_mlx.models import model_class
from qwenvl_mlx.sizes import SIZES

KEPT = Path(__file__).parent / "launches.json"
NAMES = ("Qwen-VL-Chat", "Qwen2-VL-7B", "Qwen2.5-VL-7B", "Qwen3-VL-8B", "Qwen3-VL-30B-A3B", "Qwen3.5-27B")
PICTURES = ((448, 448), (1024, 1024))

Counts = dict[str, dict[str, int]]


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


def _picture(config: dict[str, Any], size: tuple[int, int]) -> tuple[list[int], Media]:
    if config["model_type"] == "qwen":
        start = config["visual"]["image_start_id"]
        side = config["visual"]["image_size"]
        patches = side // config["visual"]["patch_size"]
        ids = [1, start, *[start + 2] * 256, start + 1, 2]
        return ids, Media("image", mx.zeros((3, side, side)), (1, patches, patches))
    given = inputs(Case("", size, 16, 1), config)
    assert given.rows is not None
    assert given.grid is not None
    return given.ids.tolist(), Media("image", mx.array(given.rows), given.grid)


def _built(config: dict[str, Any], *, bits: int | None) -> tuple[Any, Cache]:
    """A bfloat16 model and a cache of a few tokens, computed in float32: not all kernels have half types on a CPU."""
    model = model_class(config)(config)
    if bits:

        def matrices(path: str, module: nn.Module) -> bool:
            return path.startswith("language_model") and hasattr(module, "to_quantized")

        nn.quantize(model, group_size=64, bits=bits, class_predicate=matrices)
    model.prepare()
    cache = model.make_cache()
    mx.eval(model(model.embed([1, 2, 3, 4] * 16, [], []), cache=cache, last_only=True), cache.arrays)
    model.set_dtype(mx.bfloat16)
    for layer in cache:
        layer.state = tree_map(_half, layer.state)
    mx.eval(model.parameters(), cache.arrays)
    return model, cache


def _half(value: Any) -> Any:
    floating = isinstance(value, mx.array) and value.dtype == mx.float32
    return value.astype(mx.bfloat16) if floating else value


def measure() -> Counts:
    """Launches of a decoded token (bf16 and 4 bits), of a prefill of 64 tokens, and of pictures of two sizes."""
    counts: Counts = {}
    for name in NAMES:
        config = narrow(SIZES[name])
        with metal_view():
            row = {}
            for bits in (None, 4):
                model, cache = _built(config, bits=bits)
                embedded = model.embed([1, 2, 3, 4] * 16, [], [])
                prefill = count(
                    lambda e, m=model, x=embedded: m(_with(x, e), last_only=True), embedded.embeddings
                )
                fresh = [
                    copy.deepcopy(cache) for _ in range(2)
                ]  # counting runs the step twice; each run fills one
                decode = count(lambda t, m=model, caches=fresh: m.decode(t, caches.pop()), mx.array([[5]]))
                row["decode bf16" if bits is None else "decode 4 bits"] = decode.launches
                row["prefill bf16" if bits is None else "prefill 4 bits"] = prefill.launches
                if bits is None:
                    for size in PICTURES:
                        _, media = _picture(config, size)
                        row[f"picture {size[0]}x{size[1]}"] = _vision(model, media)
            counts[name] = row
    return counts


def _with(embedded: Any, embeddings: mx.array) -> Any:
    import dataclasses

    return dataclasses.replace(embedded, embeddings=embeddings)


def _vision(model: Any, media: Media) -> int:
    import dataclasses

    rows = mx.array(media.patches)
    mx.eval(rows)
    return count(lambda r: model.encode([dataclasses.replace(media, patches=r)])[0].embeddings, rows).launches


def table(counts: Counts) -> str:
    """Markdown, with the launches a decoder layer and a vision block where the depth is known."""
    columns = list(next(iter(counts.values())))
    lines = [
        "| kernels launched | "
        + " | ".join(columns)
        + " | a layer, bf16 | a layer, 4 bits | a vision block |"
    ]
    lines.append("|---" * (len(columns) + 4) + "|")
    for name, row in counts.items():
        config = SIZES[name]
        layers = config.get("text_config", config)["num_hidden_layers"]
        vision = config.get("vision_config") or config["visual"]
        blocks = vision.get("depth", vision.get("layers"))
        cells = [str(row[column]) for column in columns]
        cells += [f"{row['decode bf16'] / layers:.1f}", f"{row['decode 4 bits'] / layers:.1f}"]
        cells.append(f"{row['picture 1024x1024'] / blocks:.1f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    measured = measure()
    KEPT.write_text(json.dumps(measured, indent=1) + "\n")
    print(table(measured))
