"""The README's parity table: our logits against PyTorch's, on tiny random models of every generation.

    python -m benchmarks.parity_table

Both sides get the same weights and inputs. float32: the largest difference of any logit. bfloat16: the root mean square
error of either side against PyTorch in float32, ours first; rounding makes both differ from it, by chance one way or
the other. Needs torch and transformers; the original Qwen-VL's numbers come from files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks import parity_original as original
from benchmarks.parity_original import Cell, Row, largest, spread
from qwenvl_mlx.checkpoint.loading import cast_floating, fill
from qwenvl_mlx.layers.batch import left_pad
from qwenvl_mlx.media import Embedded, Media, Prompt
from qwenvl_mlx.models import model_class
from qwenvl_mlx.models.mrope import MRopeModel

IMAGE, VIDEO, START, END = 290, 291, 292, 293
VOCABULARY = 301
WORDS = 250  # ids below are text
IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
DECODED = 6

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 160,
    "intermediate_size": 200,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN2 = {**TEXT, "num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": {
    "rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 16, 16]}}  # fmt: skip
QWEN3 = {**TEXT, "head_dim": 80, "rope_parameters": {
    "rope_type": "default", "rope_theta": 5e6, "mrope_section": [14, 13, 13], "mrope_interleaved": True}}  # fmt: skip
MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 56}
QWEN35 = {
    **TEXT,
    "head_dim": 64,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e7,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.25,
    },
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
}
VISION3 = {
    "depth": 3,
    "hidden_size": 160,
    "intermediate_size": 180,
    "num_heads": 2,
    "out_hidden_size": 160,
    "num_position_embeddings": 100,
    "patch_size": 16,
}
VISION = {
    "qwen2_vl": {"depth": 3, "embed_dim": 160, "hidden_size": 160, "num_heads": 2, "mlp_ratio": 3},
    "qwen2_5_vl": {
        "depth": 5,
        "hidden_size": 128,
        "intermediate_size": 150,
        "num_heads": 2,
        "out_hidden_size": 160,
        "window_size": 56,
        "fullatt_block_indexes": [2, 4],
    },
    "qwen3_vl": {**VISION3, "deepstack_visual_indexes": [0, 1]},
    "qwen3_vl_moe": {**VISION3, "deepstack_visual_indexes": [1]},
    "qwen3_5": VISION3,
    "qwen3_5_moe": VISION3,
}
DECODER = {
    "qwen2_vl": QWEN2,
    "qwen2_5_vl": QWEN2,
    "qwen3_vl": QWEN3,
    "qwen3_vl_moe": {**QWEN3, **MOE, "mlp_only_layers": [1]},
    "qwen3_5": QWEN35,
    "qwen3_5_moe": {**QWEN35, **MOE, "shared_expert_intermediate_size": 48},
}
GENERATIONS = tuple(DECODER)


@dataclass(frozen=True)
class Pair:
    """The same weights on both sides."""

    generation: str
    torch_model: Any
    model: MRopeModel


def torch_model(generation: str, seed: int = 0, *, tied: bool = False) -> Any:
    """A random model of transformers, in float32, whose values are as large as those of a trained one."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(
        generation,
        text_config={**DECODER[generation]},
        vision_config={**VISION[generation]},
        tie_word_embeddings=tied,
        **IDS,
    )
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("A_log", "dt_bias")):
                continue
            if weight.ndim > 1:
                weight.normal_(0, 1.0 if "embed_tokens" in name else weight[0].numel() ** -0.5)
            elif "norm" in name and name.endswith("weight"):
                weight.add_(0.1 * torch.randn_like(weight))
            else:
                weight.normal_(0, 0.1)
    return model.eval()


def ours(reference: Any, dtype: mx.Dtype = mx.float32) -> MRopeModel:
    """The same model in MLX, from the names that transformers has in memory."""
    config = reference.config.to_dict()
    cls = model_class(config)
    weights = cls.sanitize({name: _array(value) for name, value in reference.state_dict().items()}, config)
    model = cls(config)
    fill(model, {name: cast_floating(name, w, cls, dtype) for name, w in weights.items()}, Path("memory"))
    model.prepare()
    assert isinstance(model, MRopeModel)
    return model


def _array(tensor: Any) -> mx.array:
    return mx.array(tensor.float().numpy())


def rows(generation: str, grid: tuple[int, int, int], kind: str, seed: int) -> Media:
    """Random patches of a picture or video."""
    patch = VISION[generation].get("patch_size", 14)
    count = grid[0] * grid[1] * grid[2]
    patches = np.random.default_rng(seed).normal(size=(count, 3 * 2 * patch * patch)).astype(np.float32)
    seconds = 0.75 if kind == "video" and generation == "qwen2_5_vl" else None
    return Media(kind, patches, grid, seconds_per_grid=seconds)  # type: ignore[arg-type]


def prompt(model: MRopeModel, parts: Sequence[int | Media], seed: int = 0) -> Prompt:
    """Random words (a number of them) and media between their tags."""
    words = np.random.default_rng(seed + 100)
    ids: list[int] = []
    media = [part for part in parts if isinstance(part, Media)]
    for part in parts:
        if not isinstance(part, Media):
            ids += words.integers(0, WORDS, part).tolist()
            continue
        token = IMAGE if part.kind == "image" else VIDEO
        spans = part.grid[0] if model.placeholders.frame_spans else 1
        for _ in range(spans):
            if part.kind == "video" and model.placeholders.frame_spans:
                ids += words.integers(0, WORDS, 3).tolist()  # the time stamp
            ids += [START, *[token] * (model.placeholders.tokens(part) // spans), END]
    return Prompt(ids, media)


def cases(generation: str, model: MRopeModel) -> Iterator[tuple[str, Callable[[Pair, Any], Any]]]:
    """Name and measurement of each column: ``(pair, torch model to compare with) -> (ours, theirs)``."""
    picture = rows(generation, (1, 6, 8), "image", 1)
    odd = rows(generation, (1, 2, 22), "image", 2)
    small = rows(generation, (1, 4, 4), "image", 3)
    video = rows(generation, (3, 4, 6), "video", 4)
    prompts = {
        "text": [30],
        "one picture": [5, picture, 9],
        "several": [4, picture, 3, small, odd, 8],
        "odd sizes": [3, odd, 2, rows(generation, (1, 14, 6), "image", 5), 4],
        "video": [4, video, 7],
        "picture+video": [3, small, 5, video, 2, picture, 6],
    }
    for name, parts in prompts.items():
        whole = prompt(model, parts)
        yield name, lambda pair, reference, whole=whole: single(pair, reference, whole)
    turns = prompt(model, [5, picture, 9]), prompt(model, [4, small, 8], 1)
    yield "second turn", lambda pair, reference: second_turn(pair, reference, *turns)
    batch = [prompt(model, [12]), prompt(model, [5, picture, 9]), prompt(model, [2, small, 1, odd, 4])]
    yield "padded batch", lambda pair, reference: padded(pair, reference, batch)
    yield "cached decode", lambda pair, reference: cached(pair, reference, prompt(model, [5, small, 9]))


def single(pair: Pair, reference: Any, whole: Prompt) -> tuple[Any, Any]:
    return as_numpy(pair.model.logits(whole)), torch_logits(reference, pair.model, whole)


def second_turn(pair: Pair, reference: Any, first: Prompt, second: Prompt) -> tuple[Any, Any]:
    """The second turn's logits, continued from the cache of the first."""
    cache = pair.model.make_cache()
    pair.model(ready(pair.model, first), cache)
    logits = pair.model(ready(pair.model, second), cache)
    whole = Prompt(first.input_ids + second.input_ids, first.media + second.media)
    return as_numpy(logits), torch_logits(reference, pair.model, whole)[:, len(first) :]


def padded(pair: Pair, reference: Any, prompts: Sequence[Prompt]) -> tuple[Any, Any]:
    """All tokens of a left-padded batch and, decoded together, two more; PyTorch takes row by row."""
    batch, cache = left_pad([ready(pair.model, one) for one in prompts], pair.model.make_cache())
    longest = max(map(len, prompts))
    logits = pair.model(batch, cache)
    more = mx.array([[7, 8]] * len(prompts))
    logits = as_numpy(mx.concatenate([logits, pair.model.decode(more, cache)], axis=1))
    found, wanted = [], []
    for row, one in enumerate(prompts):
        found.append(logits[row, longest - len(one) :])
        longer = Prompt([*one.input_ids, 7, 8], one.media)
        wanted.append(torch_logits(reference, pair.model, longer)[0])
    return np.concatenate(found), np.concatenate(wanted)


def cached(pair: Pair, reference: Any, whole: Prompt) -> tuple[Any, Any]:
    """Tokens decoded one by one, against PyTorch's pass over the whole."""
    cache = pair.model.make_cache()
    pair.model(ready(pair.model, whole), cache)
    tokens = list(range(11, 11 + DECODED))
    steps = [pair.model.decode(mx.array([[token]]), cache) for token in tokens]
    longer = Prompt(whole.input_ids + tokens, whole.media)
    return as_numpy(mx.concatenate(steps, axis=1)), torch_logits(reference, pair.model, longer)[:, -DECODED:]


def ready(model: MRopeModel, one: Prompt) -> Embedded:
    return model.embed(one.input_ids, model.encode(one.media), one.media)


def as_numpy(logits: mx.array) -> Any:
    return np.array(logits.astype(mx.float32))


def torch_logits(reference: Any, model: MRopeModel, whole: Prompt) -> Any:
    """PyTorch's logits of a whole prompt, ``[1, L, vocab]``, at our positions."""
    import torch

    ids = torch.tensor([whole.input_ids])
    types = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    positions, _ = model.placeholders.positions(whole.input_ids, whole.media)
    inputs: dict[str, Any] = {"position_ids": torch.tensor(positions[:, None].astype(np.int64))}
    for kind, pixels, grids in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        media = [item for item in whole.media if item.kind == kind]
        if media:
            inputs[pixels] = torch.tensor(np.concatenate([item.patches for item in media]))
            inputs[grids] = torch.tensor([item.grid for item in media])
    with torch.no_grad():
        out = reference(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=types,
            use_cache=False,
            **inputs,
        )
    return out.logits.float().numpy()


def measure(generation: str) -> Row:
    """Every case of a later generation, live."""
    import copy

    import torch

    reference = torch_model(generation)
    half_reference = copy.deepcopy(reference).to(torch.bfloat16)
    pair = Pair(generation, reference, ours(reference))
    half = Pair(generation, half_reference, ours(reference, mx.bfloat16))
    results = {}
    for name, run in cases(generation, pair.model):
        found, wanted = run(pair, reference)
        rounded, theirs = run(half, half_reference)
        results[name] = Cell(largest(found, wanted), (spread(rounded, wanted), spread(theirs, wanted)))
    return results


def main() -> int:
    """Print the Markdown table."""
    table = {"qwen (Qwen-VL)": original.measure()}
    table |= {generation: measure(generation) for generation in GENERATIONS}
    names = list(table[GENERATIONS[0]])
    print("| | |", " | ".join(names), "|")
    print("|---|---|" + "---|" * len(names))
    for generation, results in table.items():
        cells = [results.get(name, Cell()) for name in names]
        print(f"| {generation} | float32 |", " | ".join(cell.single for cell in cells), "|")
        print("| | bfloat16 |", " | ".join(cell.half for cell in cells), "|")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
