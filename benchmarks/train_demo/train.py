"""Train the demo: `python train.py OUT` runs or resumes both stages, and writes the model into OUT/demo."""

import argparse
import json
import os
import shutil
from pathlib import Path
from random import Random

import torch
import torch.distributed as dist
from dense import DenseHeads, label
from model import DEMO, Network, Packer, build_model, build_tokenizer, config_dict, see
from questions import draw
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

# Steps; rates of Muon and AdamW; a factor for the vision tower; part of the steps before the rates fall
STAGES = ((1300, 6e-3, 3e-3, 1.0, 0.4), (8000, 3e-3, 2e-3, 0.7, 0.2))


def step_loss(model: Network, heads: DenseHeads, packer: Packer, stage: int, rng: Random) -> Tensor:
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


def optimizers(model: Network, heads: nn.Module, stage: int) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of blocks, AdamW for the rest."""
    _, muon, adam, factor, _ = STAGES[stage]
    rates: list[dict[float, list[nn.Parameter]]] = [{}, {adam: list(heads.parameters())}]
    for name, p in model.named_parameters():
        if stage or ".layers." not in name:  # the first stage has no use for the decoder's blocks
            other = p.ndim != 2 or "embed" in name
            rate = (adam if other else muon) * (factor if ".visual." in name else 1)
            rates[other].setdefault(rate, []).append(p)
    matrices, rest = ([{"params": ps, "top": rate} for rate, ps in one.items()] for one in rates)
    made = torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="original")
    return [made, torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0)]


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


def train(rank: int, out: Path, port: int) -> None:
    """One of two processes; what a step sees depends on stage, step and rank only."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    tokenizer, path = Tokenizer.from_file(str(out / "tokenizer.json")), out / "state.pt"
    model, packer = build_model(tokenizer), Packer(tokenizer)
    heads = DenseHeads(tokenizer, model.config.text_config.hidden_size)
    params = [p.detach() for p in model.parameters()]
    means = [p.clone() for p in params]  # a moving average, which is what is kept in the end
    state = torch.load(path) if path.exists() else {"stage": 0, "step": 0}
    if path.exists():
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        means = state["means"]
    for stage in range(state["stage"], len(STAGES)):
        makers, (total, *_, flat) = optimizers(model, heads, stage), STAGES[stage]
        first = state["step"] if stage == state["stage"] else 0
        for maker, saved in zip(makers, state["makers"] if first else (), strict=False):
            maker.load_state_dict(saved)
        for step in range(first + 1, total + 1):
            loss = step_loss(model, heads, packer, stage, Random(f"{stage}.{step}.{rank}"))
            loss.backward()
            update(makers, step / total, flat)
            torch._foreach_lerp_(means, params, max(0.002, 1 / step))
            if rank == 0 and (step % 100 == 0 or step == total):
                print(f"stage {stage}, step {step}, loss {loss.item():.3f}", flush=True)
                state = {"stage": stage, "step": step, "means": means, "model": model.state_dict()}
                state |= {"makers": [maker.state_dict() for maker in makers], "heads": heads.state_dict()}
                torch.save(state, path.with_suffix(".part"))
                path.with_suffix(".part").replace(path)


def export(out: Path) -> None:
    """The averaged weights as a model folder; template and processor settings are those of the shipped one."""
    tokenizer, state = Tokenizer.from_file(str(out / "tokenizer.json")), torch.load(out / "state.pt")
    names = [name for name, _ in build_model(tokenizer).named_parameters()]
    weights = {n: mean.to(torch.bfloat16) for n, mean in zip(names, state["means"], strict=True)}
    shutil.copytree(DEMO, out / "demo", dirs_exist_ok=True)
    save_file(weights, out / "demo" / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "demo" / "tokenizer.json"))
    ends = [tokenizer.token_to_id(text) for text in ("<|im_end|>", "<|endoftext|>")]
    ends = {"bos_token_id": ends[1], "pad_token_id": ends[1], "eos_token_id": ends, "do_sample": False}
    for name, content in (("config", config_dict(tokenizer)), ("generation_config", ends)):
        text = json.dumps(content, indent=2) + "\n"
        (out / "demo" / f"{name}.json").write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for tokenizer, state and model")
    parser.add_argument("--port", type=int, default=29511, help="where the two processes meet")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    # keep freed memory: without this a third of the time goes into fresh pages
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
    if not (args.out / "tokenizer.json").exists():
        build_tokenizer().save(str(args.out / "tokenizer.json"))
    torch.multiprocessing.spawn(train, (args.out, args.port), nprocs=2)
    export(args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
