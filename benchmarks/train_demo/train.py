"""Train the demo: `python train.py OUT` runs (or resumes) both stages on two processes of one thread, then
`python export.py OUT/stage2.pt FOLDER` and `python evaluate.py FOLDER`."""

import argparse
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.distributed as dist
from dense import DenseHeads, label
from dialogues import pair, single, talk
from model import Features, Network, Packer, answer_logits, answer_loss, build_model, see
from questions import BIN, Dialogue
from scenes import Grid, Scene, number_scene, patches, random_grid, shape_scene
from tokenizers import Tokenizer
from tokens import build_tokenizer
from torch import Tensor, nn

Batch = tuple[list[Grid], list[tuple[Scene, ...]], list[list[Dialogue]]]
RATES = {1: {"muon": 6e-3, "adam": 3e-3, "flat": 0.4, "vision": 1.0},  # flat: part of the steps before the decay
         2: {"muon": 3.5e-3, "adam": 2.5e-3, "flat": 0.25, "vision": 0.6}}  # fmt: skip


def sentences() -> Iterable[str]:
    """What the tokenizer learns from."""
    rng = Random(1)
    for n in range(3000):
        grids = random_grid(rng), random_grid(rng)
        scenes = shape_scene(rng, grids[0]), shape_scene(rng, grids[1])
        asked = single(rng, number_scene(rng, grids[0]) if n % 3 == 0 else scenes[0])
        for dialogue in [*asked, *pair(rng, scenes, 2), talk(rng, blind=True)]:
            yield from (text for turn in dialogue for text in turn[1:])
    yield from (
        f'[{{"bbox_2d": [{v}, {v}, {v}, {v}], "label": "' for v in range(0, 1001, BIN) for _ in range(40)
    )
    yield from ["system", "user", "assistant", "You are a helpful assistant.\n", "seconds", "<", ">"] * 9
    yield from ["Is it to the left of, right of, above or below?", "Which way did the shape move?", "It moved left.",
                "Does it move to the right, up or down?", "它在左边，右边，上面，下面吗？",
                "形状往哪个方向移动？向左。"] * 9  # fmt: skip


def draw(rng: Random, kind: str, size: int) -> Batch:
    """A batch of one kind: shapes, number, pair or talk."""
    if kind == "talk":
        return [], [() for _ in range(size)], [[talk(rng, blind=True)] for _ in range(size)]
    grids = [random_grid(rng, 24 if kind != "pair" else 16) for _ in range(2 if kind == "pair" else 1)]
    make = number_scene if kind == "number" else shape_scene
    rows = [tuple(make(rng, grid) for grid in grids) for _ in range(size)]
    if kind == "pair":
        return grids, rows, [pair(rng, row) for row in rows]
    extra = [[talk(rng, blind=False)] if rng.random() < 0.1 else [] for _ in rows]
    return grids, rows, [single(rng, row[0]) + more for row, more in zip(rows, extra, strict=True)]


def batches(stage: int, rng: Random) -> list[Batch]:
    """What one process sees in one step."""
    if stage == 1:
        return [draw(rng, "shapes", 14), draw(rng, "number", 8)]
    made = [draw(rng, "shapes", 5), draw(rng, "number", 3)]
    if rng.random() < 0.6:
        made.append(draw(rng, "pair", 2))
    return [*made, draw(rng, "talk", 3)] if rng.random() < 0.1 else made


def look(model: Network, grids: list[Grid], rows: list[tuple[Scene, ...]]) -> list[Features]:
    """Features of each picture place over the batch."""
    stacks = [np.stack([patches(row[n].picture, grid) for row in rows]) for n, grid in enumerate(grids)]
    return [see(model, torch.from_numpy(stack), grid) for stack, grid in zip(stacks, grids, strict=True)]


def dense_loss(model: Network, heads: DenseHeads, batch: Batch, seen: list[Features]) -> Tensor:
    """How well the features of a batch tell what each cell shows."""
    embed, losses = model.model.language_model.embed_tokens.weight, []
    for n, grid in enumerate(batch[0]):
        labels = [label(row[n], grid) for row in batch[1]]
        stacked = {name: torch.from_numpy(np.stack([one[name] for one in labels])) for name in labels[0]}
        losses.append(heads(sum(seen[n]), stacked, embed))
    return torch.stack(losses).mean()


def step_losses(model: Network, heads: DenseHeads, packer: Packer, stage: int, rng: Random) -> Tensor:
    """Losses of one step on this process: answers, and what the cells show."""
    told, shown = torch.zeros(()), torch.zeros(())
    for batch in batches(stage, rng):
        seen = look(model, batch[0], batch[1])
        if seen:
            shown = shown + dense_loss(model, heads, batch, seen) * (
                len(batch[1]) / (14 if stage == 1 else 8)
            )
        if stage == 2:
            packed = packer.pack(batch[0], batch[2], rng)
            told = told + answer_loss(packer, *answer_logits(model, packed, seen)) / 60
    return torch.stack([told, shown])


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonal updates; each process works out half of the matrices."""

    def __init__(self, groups: list[dict[str, object]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        params = [
            (p, group["lr"]) for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        updates = []
        for n, (p, _) in enumerate(params):
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 0.05)
            mine = n % dist.get_world_size() == dist.get_rank()
            updates.append(
                (orthogonal(p.grad.lerp(momentum, 0.95)) if mine else torch.zeros_like(p)).flatten()
            )
        flat = torch.cat(updates)
        dist.all_reduce(flat)
        for (p, lr), update in zip(params, flat.split([p.numel() for p, _ in params]), strict=True):
            p.add_(update.view_as(p), alpha=-lr)


def orthogonal(matrix: Tensor) -> Tensor:
    """Newton-Schulz: singular values to about one; a large square is taken as four slabs."""
    x = matrix.reshape(-1, 128, matrix.shape[1]) if matrix.shape[0] == 512 else matrix[None]
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    x = x.mT if tall else x
    return x.reshape(matrix.shape) * max(1, x.shape[1] / x.shape[2]) ** 0.5


def optimizers(model: Network, heads: nn.Module, stage: int) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of blocks, AdamW for the rest; the vision tower slower in stage 2."""
    groups: dict[str, list[dict[str, object]]] = {"muon": [], "adam": []}
    for method, found in groups.items():
        for vision in (True, False):
            rate = RATES[stage][method] * (RATES[stage]["vision"] if vision else 1)
            found.append({"params": [], "lr": rate, "top": rate, "vision": vision})
    for name, p in model.named_parameters():
        if stage == 2 or ".layers." not in name:
            method = "muon" if p.ndim == 2 and "embed" not in name else "adam"
            groups[method][".visual." not in name]["params"].append(p)
    groups["adam"][1]["params"] += heads.parameters()
    filled = {method: [group for group in found if group["params"]] for method, found in groups.items()}
    return [Muon(filled["muon"]), torch.optim.AdamW(filled["adam"], betas=(0.9, 0.95), weight_decay=0.0)]


def update(makers: list[torch.optim.Optimizer], part: float, stage: int) -> None:
    """Average gradients over processes and take a step, `part` of the way through the stage."""
    groups = [group for maker in makers for group in maker.param_groups]
    params = [p for group in groups for p in group["params"]]
    flat = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in params])
    dist.all_reduce(flat)
    for p, grad in zip(
        params, (flat / dist.get_world_size()).split([p.numel() for p in params]), strict=True
    ):
        p.grad = grad.view_as(p)
    for group in groups:
        group["lr"] = group["top"] * min(1.0, (1 - part) / (1 - RATES[stage]["flat"]), part * 100 + 0.03)
    for maker in makers:
        maker.step()
        maker.zero_grad()


def train(rank: int, out: Path, stage: int, steps: int, port: int) -> None:
    """One process of one stage; the data of a step depend on stage, step and rank only."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    tokenizer, rng = Tokenizer.from_file(str(out / "tokenizer.json")), Random(2)
    rows = np.concatenate([patches(shape_scene(rng, (4, 4)).picture, (4, 4)) for _ in range(200)])
    model, packer = build_model(tokenizer, torch.from_numpy(rows)), Packer(tokenizer)
    heads = DenseHeads(tokenizer, model.config.text_config.hidden_size)
    makers, path, first = optimizers(model, heads, stage), out / f"stage{stage}.pt", 0
    if path.exists() or stage == 2:
        state = torch.load(path if path.exists() else out / "stage1.pt")
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
    if path.exists():
        first = state["step"]
        for maker, one in zip(makers, state["makers"], strict=True):
            maker.load_state_dict(one | {"param_groups": maker.state_dict()["param_groups"]})
    began, sums = time.time(), torch.zeros(2)
    for step in range(first, steps):
        losses = step_losses(model, heads, packer, stage, Random(f"{stage}.{step}.{rank}"))
        (losses[1] if stage == 1 else losses[0] + 0.5 * losses[1]).backward()
        update(makers, step / steps, stage)
        sums += losses.detach() / 50
        if rank == 0 and (step + 1) % 50 == 0:
            told, shown = sums.tolist()
            line = {"stage": stage, "step": step + 1, "seconds": round(time.time() - began)}
            print(json.dumps(line | {"told": round(told, 4), "shown": round(shown, 4)}), flush=True)
            sums.zero_()
        if rank == 0 and ((step + 1) % 250 == 0 or step + 1 == steps):
            states = {"makers": [maker.state_dict() for maker in makers], "step": step + 1}
            torch.save(
                states | {"model": model.state_dict(), "heads": heads.state_dict()}, path.with_suffix(".tmp")
            )
            path.with_suffix(".tmp").replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for tokenizer and checkpoints")
    parser.add_argument(
        "--steps", type=int, nargs=2, default=(1300, 3600), help="steps of stage 1 and stage 2"
    )
    parser.add_argument("--port", type=int, default=29511)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    # keep freed memory: without this a third of the time goes into fresh pages
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
    if not (args.out / "tokenizer.json").exists():
        build_tokenizer(sentences()).save(str(args.out / "tokenizer.json"))
    for stage, steps in enumerate(args.steps, 1):
        torch.multiprocessing.spawn(train, (args.out, stage, steps, args.port + stage), nprocs=2)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
