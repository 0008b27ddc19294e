"""Runs the golden cases of one generation: one runner for all of them.

A golden holds what the PyTorch code computed in float32 with the same weights: see the README beside them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from helpers import reference

from qwenvl_mlx.checkpoint import load_model
from qwenvl_mlx.layers.batch import left_pad
from qwenvl_mlx.layers.cache import Cache
from qwenvl_mlx.media import Embedded, Media, Prompt
from qwenvl_mlx.models.mrope import MRopeModel

LAST = 12  # a golden holds the logits of this many last positions
CLEAR = 1e-3  # greedy choices are compared until the two best logits are closer than this


@dataclass(frozen=True)
class Case:
    """One golden file: arrays by name."""

    arrays: dict[str, Any]
    video_rows: Any = None

    @classmethod
    def load(cls, generation: str, name: str) -> Case:
        arrays = dict(np.load(reference(f"{generation}/goldens/{name}.npz")))
        if name == "video_flat":  # its pixels are those of the other form
            return cls(arrays, np.load(reference(f"{generation}/goldens/video.npz"))["pixel_values_videos"])
        return cls(arrays, arrays.get("pixel_values_videos"))

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def __getitem__(self, key: str) -> Any:
        return self.arrays[key]

    @property
    def rows(self) -> int:
        return len(self["input_ids"])

    def ids(self, row: int) -> list[int]:
        return self["input_ids"][row][self["attention_mask"][row] > 0].tolist()  # type: ignore[no-any-return]

    def media(self, kind: str) -> list[Media]:
        """All pictures or all videos of the case, in order."""
        pixels, grids = (
            (self.arrays.get("pixel_values"), self.arrays.get("image_grid_thw"))
            if kind == "image"
            else (self.video_rows, self.arrays.get("video_grid_thw"))
        )
        if grids is None:
            return []
        seconds = self.arrays.get("second_per_grid_ts") if kind == "video" else None
        ends = np.cumsum(grids.prod(1))
        return [
            Media(
                kind,
                pixels[end - grid.prod() : end],
                tuple(grid.tolist()),
                seconds_per_grid=None if seconds is None else float(seconds[index]),
            )
            for index, (grid, end) in enumerate(zip(grids, ends, strict=True))
        ]

    def prompts(self, model: MRopeModel) -> list[Prompt]:
        """The rows of the case, with the media that belong to each, in the order of their placeholders."""
        spec = model.placeholders
        waiting = {kind: self.media(kind) for kind in ("image", "video")}
        prompts = []
        for row in range(self.rows):
            ids = self.ids(row)
            media = []
            for kind, token in (("image", spec.image), ("video", spec.video)):
                places = [index for index, found in enumerate(ids) if found == token]
                while places:
                    item = waiting[kind].pop(0)
                    media.append((places[0], item))
                    places = places[spec.tokens(item) :]
            media.sort(key=lambda pair: pair[0])
            prompts.append(Prompt(ids, [item for _, item in media]))
        return prompts


def load(folder: str, dtype: str = "float32") -> MRopeModel:
    """A tiny checkpoint of the reference data."""
    model = load_model(reference(folder), dtype=dtype)
    assert isinstance(model, MRopeModel)
    return model


def embedded(model: MRopeModel, prompt: Prompt, positions: Any = None) -> Embedded:
    """A prompt ready for the decoder, with other positions than ours if given (``[3, L]``)."""
    ready = model.embed(prompt.input_ids, model.encode(prompt.media), prompt.media)
    if positions is None:
        return ready
    delta = int(positions.max()) + 1 - len(prompt)
    return replace(ready, positions=mx.array(positions.astype(np.int32)), rope_delta=delta)


def batch(model: MRopeModel, rows: list[Embedded]) -> tuple[Embedded, Cache]:
    if len(rows) == 1:
        return rows[0], model.make_cache()
    return left_pad(rows, model.make_cache())


def greedy(model: MRopeModel, logits: mx.array, cache: Cache, count: int) -> tuple[Any, Any]:
    """``count`` greedy tokens ``[B, count]`` after a prefill, and the logits of each step ``[B, count, vocab]``."""
    tokens, steps = [], []
    last = logits[:, -1]
    for _ in range(count):
        steps.append(np.array(last.astype(mx.float32)))
        token = mx.argmax(last, axis=-1)
        tokens.append(np.array(token))
        last = model.decode(token[:, None], cache)[:, -1]
    return np.stack(tokens, 1), np.stack(steps, 1)


def same_until_unclear(ours: Any, theirs: Any, logits: Any) -> bool:
    """Equal tokens in every row, up to the first choice that float32 can't settle."""
    for row in range(len(theirs)):
        two = np.sort(logits[row], axis=-1)[:, -2:]
        unclear = np.flatnonzero(two[:, 1] - two[:, 0] < CLEAR)
        end = unclear[0] if len(unclear) else theirs.shape[1]
        if not np.array_equal(ours[row, :end], theirs[row, :end]):
            return False
    return True


class Recorder:
    """Stands in for a block and keeps what it gives, in the order of calls."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.outputs: list[mx.array] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.outputs.append(self.block(*args, **kwargs))
        return self.outputs[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


def difference(ours: mx.array | Any, theirs: Any) -> float:
    return float(np.abs(np.array(ours, np.float64) - theirs).max())


def check_case(model: MRopeModel, case: Case, tolerance: float) -> None:
    """Positions, logits in a batch and row by row, and 32 cached greedy tokens of one golden."""
    prompts = case.prompts(model)
    rows = [embedded(model, prompt) for prompt in prompts]
    trained = "logits_qwen_positions" in case  # the positions that we follow, where transformers 5 has others
    check_positions(case, rows)
    wanted = case["logits_qwen_positions" if trained else "logits"]
    for row, ready in enumerate(rows):
        report(f"row {row}", model(ready)[:, -LAST:], wanted[row : row + 1], tolerance)
    ready, cache = batch(model, rows)
    logits = model(ready, cache)
    report("logits", logits[:, -LAST:], wanted, tolerance)
    tokens, steps = greedy(model, logits, cache, 32)
    assert same_until_unclear(tokens, case["greedy_qwen_positions" if trained else "greedy"], steps)
    if trained:
        theirs = embedded(model, prompts[0], case["position_ids"][:, 0])
        report("logits at transformers 5's positions", model(theirs)[:, -LAST:], case["logits"], tolerance)
    elif "greedy_logits" in case:
        report("greedy logits", steps[:, :4], case["greedy_logits"], tolerance)


def check_positions(case: Case, rows: list[Embedded]) -> None:
    suffix = "_qwen" if "position_ids_qwen" in case else ""
    for row, ready in enumerate(rows):
        attended = case["attention_mask"][row] > 0
        assert np.array_equal(np.array(ready.positions), case["position_ids" + suffix][:, row][:, attended])
        assert ready.rope_delta == case["rope_deltas" + suffix][row, 0]


def check_stages(model: MRopeModel, case: Case, tolerance: float) -> None:
    """Every vision block, merger, tap and decoder layer that a single-row golden holds.

    Their values reach hundreds: differences are relative to the largest.
    """
    tower, body = model.vision_tower, model.language_model.model
    taps = tower.get("deepstack_merger_list", [])
    stages = {"vit_patch_embed": tower.patch_embed, "vit_merger": tower.merger, "final_norm": body.norm}
    stages |= {f"vit_block_{index}": block for index, block in enumerate(tower.blocks)}
    stages |= {f"vit_deepstack_{index}": tap for index, tap in enumerate(taps)}
    stages |= {f"layer_{index}": layer for index, layer in enumerate(body.layers)}
    prompt = case.prompts(model)[0]
    # layers were recorded at transformers 5's positions
    outputs = recorded(model, stages, lambda: model(embedded(model, prompt, case["position_ids"][:, 0])))
    for name in outputs.keys() & case.arrays.keys():
        ours = mx.concatenate(outputs[name]) if name.startswith("vit") else outputs[name][0]
        report_stage(name, ours, case[name], tolerance)
    for name in ("vit_merger", *(f"vit_deepstack_{index}" for index in range(len(taps)))):
        if f"{name}__call0" in case:  # the reference sends pictures first, then videos
            kinds = [item.kind for item in prompt.media]
            for call, kind in enumerate(("image", "video")):
                ours = [out for out, found in zip(outputs[name], kinds, strict=True) if found == kind]
                report_stage(f"{name} {kind}", mx.concatenate(ours), case[f"{name}__call{call}"], tolerance)


def check_second_turn(model: MRopeModel, case: Case, tolerance: float) -> None:
    """A second turn with a picture of its own, continued from the cache of the first, in two ways."""
    first_ids, answer = case["turn1_input_ids"][0].tolist(), case["turn1_greedy"]
    whole = case.prompts(model)[0]
    media = whole.media
    first = embedded(model, Prompt(first_ids, media[:1]))
    cache = model.make_cache()
    tokens, _ = greedy(model, model(first, cache), cache, answer.shape[1])
    assert np.array_equal(tokens, answer)
    again = model.make_cache()
    model(first, again)
    model.decode(mx.array(answer), again)  # several tokens at once
    fresh = embedded(model, Prompt(case["turn2_new_ids"][0].tolist(), media[1:]))
    logits = model(fresh, cache)
    report("a fresh piece after the cache", logits[:, -LAST:], case["logits"], tolerance)
    rest = embedded(model, whole).slice(len(first_ids) + answer.shape[1], len(whole))
    report("a slice of the whole", model(rest, again)[:, -LAST:], case["logits"], tolerance)
    for state in (cache, again):
        assert state.next_position.item() == len(whole) + case["rope_deltas"][0, 0]
    tokens, steps = greedy(model, logits, cache, 32)
    assert same_until_unclear(tokens, case["greedy"], steps)


def recorded(model: MRopeModel, stages: dict[str, nn.Module], run: Any) -> dict[str, list[mx.array]]:
    """What each stage gives during ``run``. The model's blocks are put back afterwards."""
    recorders = {id(module): Recorder(module) for module in stages.values()}

    def swap(parent: Any, table: dict[int, Any]) -> None:
        items = parent.items() if isinstance(parent, dict) else enumerate(parent)
        for key, child in list(items):
            if id(child) in table:
                parent[key] = table[id(child)]
            elif isinstance(child, (dict, list)):
                swap(child, table)

    swap(model, recorders)
    mx.eval(run())
    swap(model, {id(recorder): recorder.block for recorder in recorders.values()})
    return {name: recorders[id(module)].outputs for name, module in stages.items()}


def report(what: str, ours: Any, theirs: Any, tolerance: float) -> None:
    """Print the largest difference, then compare it: ``pytest -s`` shows the parity of every stage."""
    found = difference(ours, theirs)
    print(f"{what}: {found:.1e}")
    assert found < tolerance, f"{what} differs by {found:.1e}"


def report_stage(what: str, ours: Any, theirs: Any, tolerance: float) -> None:
    scale = max(1.0, float(np.abs(theirs).max()))
    report(what, np.array(ours) / scale, theirs / scale, tolerance / 10)
