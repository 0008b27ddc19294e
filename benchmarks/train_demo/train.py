"""Train the demo: `torchrun --nproc-per-node 2 train.py OUT` runs or resumes both stages and writes OUT/demo."""

import shutil
import sys
from pathlib import Path
from random import Random

import torch
import torch.distributed as dist
from data import draw
from model import DEMO, IMAGE, DenseHeads, Packer, build_model, build_tokenizer, label, see
from safetensors.torch import save_file
from torch import Tensor, nn

# Steps; rates of Muon and AdamW; a factor for the vision tower; part of the steps before the rates fall
STAGES = ((1300, 6e-3, 3e-3, 1.0, 0.4), (8000, 3e-3, 2e-3, 0.7, 0.2))


def step_loss(model: nn.Module, heads: DenseHeads, packer: Packer, stage: int, rng: Random) -> Tensor:
    """Loss of one step on this process: what the cells show, and in the second stage the answers."""
    total, embed = torch.zeros(()), model.model.language_model.embed_tokens.weight
    sizes = {"shapes": 4, "number": 2, "pair": 2, "video": 2} if stage else {"shapes": 14, "number": 8}
    for kind, size in (sizes | ({"talk": 2} if stage and rng.random() < 0.06 else {})).items():
        grids, rows, dialogues = draw(rng, kind, size)
        seen = [see(model, [row[n].picture for row in rows], grid) for n, grid in enumerate(grids)]
        for n, grid in enumerate(grids):
            shown = heads(sum(seen[n]), [label(row[n], grid) for row in rows], embed)
            total = total + shown * size / (16 * len(grids) if stage else 14)
        if stage:
            total = total + packer.loss(model, packer.pack(model, kind, grids, dialogues, rng), seen) / 60
    return total


def optimizers(model: nn.Module, heads: nn.Module, stage: int) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of blocks, AdamW for the rest."""
    rates: list[dict[float, list[nn.Parameter]]] = [{}, {STAGES[stage][2]: list(heads.parameters())}]
    for name, p in model.named_parameters():
        if stage or ".layers." not in name:  # the first stage has no use for the decoder's blocks
            other = p.ndim != 2 or "embed" in name
            rate = STAGES[stage][1 + other] * (STAGES[stage][3] if ".visual." in name else 1)
            rates[other].setdefault(rate, []).append(p)
    matrices, rest = ([{"params": ps, "top": rate} for rate, ps in one.items()] for one in rates)
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0)
    return [torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="original"), adam]


def update(makers: list[torch.optim.Optimizer], part: float, flat: float) -> None:
    """Average gradients over the processes and take a step, `part` of the way through the stage."""
    groups = [group for maker in makers for group in maker.param_groups]
    params = [p for group in groups for p in group["params"]]
    grads = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in params])
    dist.all_reduce(grads)
    for p, grad in zip(params, (grads / 2).split([p.numel() for p in params]), strict=True):
        p.grad = grad.view_as(p)
    for group in groups:
        group["lr"] = group["top"] * min(1.0, (1 - part) / (1 - flat), part * 100 + 0.03)
    for maker in makers:
        maker.step()
        maker.zero_grad()


def main(out: Path) -> None:
    """One of two processes; what a step sees depends on stage, step and rank only."""
    dist.init_process_group("gloo")
    rank, path, tokenizer = dist.get_rank(), out / "state.pt", build_tokenizer()
    model, packer = build_model(tokenizer), Packer(tokenizer)
    assert model.config.image_token_id == packer.encode(IMAGE)[0], "mend the ids in config.json"
    heads = DenseHeads(tokenizer, model.config.text_config.hidden_size)
    params = [p.detach() for p in model.parameters()]
    state = {"stage": 0, "step": 0, "model": model.state_dict(), "heads": heads.state_dict(), "makers": []}
    state = torch.load(path) if path.exists() else state | {"means": [p.clone() for p in params]}
    model.load_state_dict(state["model"])
    heads.load_state_dict(state["heads"])
    for stage in range(state["stage"], len(STAGES)):
        makers, (total, *_, flat) = optimizers(model, heads, stage), STAGES[stage]
        first = state["step"] if stage == state["stage"] else 0
        for maker, saved in zip(makers, state["makers"] if first else (), strict=False):
            maker.load_state_dict(saved)
        for step in range(first + 1, total + 1):
            loss = step_loss(model, heads, packer, stage, Random(f"{stage}.{step}.{rank}"))
            loss.backward()
            update(makers, step / total, flat)
            torch._foreach_lerp_(state["means"], params, max(0.002, 1 / step))  # what is kept in the end
            if rank == 0 and (step % 100 == 0 or step == total):
                print(f"stage {stage}, step {step}, loss {loss.item():.3f}", flush=True)
                state |= {"stage": stage, "step": step, "model": model.state_dict()}
                state |= {"heads": heads.state_dict(), "makers": [maker.state_dict() for maker in makers]}
                torch.save(state, path.with_suffix(".part"))
                path.with_suffix(".part").replace(path)
    if rank == 0:
        shutil.copytree(DEMO, out / "demo", dirs_exist_ok=True)
        named = zip(model.named_parameters(), state["means"], strict=True)
        weights = {name: mean.to(torch.bfloat16) for (name, _), mean in named}
        save_file(weights, out / "demo" / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save(str(out / "demo" / "tokenizer.json"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
