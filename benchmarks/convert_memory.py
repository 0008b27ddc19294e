"""Measure conversions of synthetic checkpoints: peak memory, and time against ``cp`` and mlx-vlm.

python -m benchmarks.convert_memory                        # 2 GB; torch and psutil are needed
python -m benchmarks.convert_memory --gigabytes 2 8 --peer-python PYTHON-THAT-HAS-MLX-VLM
python -m benchmarks.convert_memory --folder DIR           # keeps the checkpoints there for the next time

Programs take turns on the same source, which is read from the disk, not from the system's cache, where the system lets
one say so; time runs until all bytes are on the disk again. Times are the best of the rounds, peaks the highest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HIDDEN, FFN, VOCABULARY, WIDTH, VIT_FFN = 2048, 5504, 76_032, 1664, 8192
SHARD_BYTES = 450_000_000
MEGABYTE = 1e6
FORMATS = (("qwen", ".bin"), ("qwen3_vl", ".safetensors"), ("qwen3_vl", ".bin"))


Shapes = Iterator[tuple[str, tuple[int, ...]]]


def qwen_shapes(layers: int) -> Shapes:
    """Names and shapes of the original Qwen-VL's hub checkpoint, at a smaller width."""
    yield "transformer.wte.weight", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        at = f"transformer.h.{layer}"
        yield f"{at}.attn.c_attn.weight", (3 * HIDDEN, HIDDEN)
        yield f"{at}.attn.c_attn.bias", (3 * HIDDEN,)
        yield f"{at}.attn.c_proj.weight", (HIDDEN, HIDDEN)
        yield f"{at}.mlp.w1.weight", (FFN, HIDDEN)
        yield f"{at}.mlp.w2.weight", (FFN, HIDDEN)
        yield f"{at}.mlp.c_proj.weight", (HIDDEN, FFN)
        yield from ((f"{at}.{norm}.weight", (HIDDEN,)) for norm in ("ln_1", "ln_2"))
    yield "transformer.ln_f.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)
    yield from vision_shapes("transformer.visual")


def vision_shapes(at: str) -> Shapes:
    """The vision tower with one block."""
    yield f"{at}.conv1.weight", (WIDTH, 3, 14, 14)
    yield f"{at}.positional_embedding", (256, WIDTH)
    yield f"{at}.proj", (HIDDEN, HIDDEN)
    block = f"{at}.transformer.resblocks.0"
    pool = f"{at}.attn_pool"
    linear = {
        f"{block}.attn.in_proj": (3 * WIDTH, WIDTH),
        f"{block}.attn.out_proj": (WIDTH, WIDTH),
        f"{block}.mlp.c_fc": (VIT_FFN, WIDTH),
        f"{block}.mlp.c_proj": (WIDTH, VIT_FFN),
        f"{pool}.attn.out_proj": (HIDDEN, HIDDEN),
    }
    for name, shape in linear.items():
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]
    norms = {f"{at}.ln_pre": WIDTH, f"{block}.ln_1": WIDTH, f"{block}.ln_2": WIDTH}
    norms |= {f"{pool}.ln_q": HIDDEN, f"{pool}.ln_kv": HIDDEN, f"{at}.ln_post": HIDDEN}
    for name, size in norms.items():
        yield f"{name}.weight", (size,)
        yield f"{name}.bias", (size,)
    yield f"{pool}.query", (256, HIDDEN)
    yield f"{pool}.pos_embed", (256, HIDDEN)
    yield f"{pool}.kv_proj.weight", (HIDDEN, WIDTH)
    yield f"{pool}.attn.in_proj_weight", (3 * HIDDEN, HIDDEN)
    yield f"{pool}.attn.in_proj_bias", (3 * HIDDEN,)


def qwen3_vl_config(layers: int) -> dict[str, Any]:
    from qwenvl_mlx.sizes import SIZES

    config = SIZES["Qwen3-VL-2B"]
    text = config["text_config"] | {"num_hidden_layers": layers, "model_type": "qwen3_vl_text"}
    vision = config["vision_config"] | {"model_type": "qwen3_vl"}
    return config | {"text_config": text, "vision_config": vision, "dtype": "bfloat16"}


def qwen3_vl_shapes(layers: int) -> Shapes:
    """Names and shapes of the hub's checkpoint, from those of the MLX folder."""
    from mlx.utils import tree_flatten

    from qwenvl_mlx.checkpoint.loading import build
    from qwenvl_mlx.layers.weights import PATCH_EMBEDDING

    for name, array in tree_flatten(build(qwen3_vl_config(layers)).parameters()):
        shape = array.shape
        if name == PATCH_EMBEDDING:
            shape = (shape[0], shape[-1], *shape[1:-1])
        name = name.replace("vision_tower.", "model.visual.")
        yield name.replace("language_model.model.", "model.language_model."), shape


def qwen_config(layers: int) -> dict[str, Any]:
    visual = {"image_size": 448, "patch_size": 14, "width": WIDTH, "layers": 1, "heads": 16}
    return {
        "model_type": "qwen",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_attention_heads": HIDDEN // 128,
        "kv_channels": 128,
        "num_hidden_layers": layers,
        "intermediate_size": 2 * FFN,
        "layer_norm_epsilon": 1e-6,
        "seq_length": 2048,
        "max_position_embeddings": 8192,
        "torch_dtype": "bfloat16",
        "visual": visual
        | {"mlp_ratio": VIT_FFN / WIDTH + 1e-4, "output_dim": HIDDEN, "image_start_id": 76_000},
    }


KINDS = {"qwen": (qwen_config, qwen_shapes), "qwen3_vl": (qwen3_vl_config, qwen3_vl_shapes)}


def make_checkpoint(folder: Path, kind: str, suffix: str, gigabytes: float) -> None:
    """Write shards of bfloat16 values, as many layers as give that size."""
    import torch
    from safetensors.torch import save_file

    config, shapes = KINDS[kind]
    one, two = (sum(2 * torch.Size(shape).numel() for _, shape in shapes(n)) for n in (1, 2))
    layers = max(1, round((gigabytes * 1e9 - one) / (two - one)) + 1)
    folder.mkdir(parents=True)
    demo = Path(__file__).parent.parent / "qwenvl_mlx" / "demo"
    for path in (*demo.glob("*token*"), *demo.glob("*process*"), *demo.glob("*.jinja")):
        shutil.copy(path, folder)  # mlx-vlm converts nothing without a processor
    values = torch.empty(64_000_000, dtype=torch.bfloat16).normal_(std=0.02)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05}{suffix}"
        save_file(shard, folder / name, {"format": "pt"}) if suffix == ".safetensors" else torch.save(
            shard, folder / name
        )
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes(layers):
        count = torch.Size(shape).numel()
        tensor = values.repeat(-(-count // len(values)))[:count].reshape(shape).clone()
        if shard and sum(other.nbytes for other in shard.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        shard[name] = tensor
    flush()
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(layers)))  # last: the checkpoint is complete


@dataclass(frozen=True)
class Cost:
    """Seconds, and peak resident megabytes."""

    seconds: float
    peak: float


def run(command: list[str], source: Path, target: Path) -> Cost:
    """Cost of a command that makes ``target`` from ``source``, the disk's part included; ``target`` is removed."""
    _forget(source)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    os.sync()
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    unit = 1 if platform.system() == "Darwin" else 1024  # of ru_maxrss, in bytes
    return Cost(seconds, usage.ru_maxrss * unit / MEGABYTE)


def _forget(folder: Path) -> None:
    """Have the system drop what it holds of these files in memory, where it can be told to."""
    os.sync()
    if hasattr(os, "posix_fadvise"):
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(source: Path, work: Path, options: list[str], *, peer_python: str | None, rounds: int) -> str:
    """One line of the table."""
    target = work / "out"
    paths = ["--hf-path", str(source), "--mlx-path", str(target), *options]
    commands = {
        "cp": ["cp", "-r", str(source), str(target)],
        "qwenvl-mlx": [sys.executable, "-m", "qwenvl_mlx.convert", *paths],
    }
    shards = [path for path in source.iterdir() if path.suffix in (".bin", ".safetensors")]
    if peer_python and shards[0].suffix == ".safetensors":  # it reads nothing else
        commands["mlx-vlm"] = [peer_python, "-m", "mlx_vlm", "convert", *paths]
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            costs[name].append(run(command, source, target))
    best = {name: min(cost.seconds for cost in seen) for name, seen in costs.items()}
    size, largest = (f(path.stat().st_size for path in shards) for f in (sum, max))
    cells = [f"{source.name}, {size / 1e9:.2f} GB", " ".join(options) or "plain"]
    cells += [f"{largest / MEGABYTE:.0f} MB", f"{best['cp']:.1f} s"]
    for name in ("qwenvl-mlx", "mlx-vlm"):
        seen = costs.get(name)
        peak = max(cost.peak for cost in seen) if seen else 0
        cells += (
            [f"{best[name]:.1f} s", f"{best[name] / best['cp']:.2f}", f"{peak:.0f} MB"] if seen else [""] * 3
        )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--gigabytes", type=float, nargs="+", default=[2.0])
    add("--format", nargs="+", choices=[kind + suffix for kind, suffix in FORMATS], help="default: all")
    add("--peer-python", metavar="PYTHON", help="interpreter of an environment that has mlx-vlm")
    add("--rounds", type=int, default=3)
    add("--folder", type=Path, help="where to work; checkpoints stay there (default: a temporary folder)")
    args = parser.parse_args()
    print("| source | options | largest shard | cp | qwenvl-mlx | / cp | peak | mlx-vlm | / cp | peak |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        for gigabytes in args.gigabytes:
            for kind, suffix in FORMATS:
                if args.format and kind + suffix not in args.format:
                    continue
                source = Path(args.folder or work, f"{kind}-{gigabytes:g}{suffix}")
                if not (source / "config.json").exists():
                    shutil.rmtree(source, ignore_errors=True)
                    # In its own process: a child's peak memory counts that of the process it was forked from.
                    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                        pool.submit(make_checkpoint, source, kind, suffix, gigabytes).result()
                for options in ([], ["-q"]):
                    line = measure(
                        source, Path(work), options, peer_python=args.peer_python, rounds=args.rounds
                    )
                    print(line, flush=True)


if __name__ == "__main__":
    main()
