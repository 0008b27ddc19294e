"""Measure the conversion of a synthetic checkpoint of the original Qwen-VL: peak memory, and time against ``cp``.

python benchmarks/convert_memory.py --gigabytes 2            # torch is needed to write the .bin shards
python benchmarks/convert_memory.py --gigabytes 8 -- -q      # what follows -- goes to the conversion
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
from multiprocessing import get_context
from pathlib import Path

HIDDEN, FFN, VOCABULARY, WIDTH, VIT_FFN = 2048, 5504, 76_032, 1664, 8192
SHARD_BYTES = 450_000_000
MEGABYTE = 1e6


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the hub's checkpoint, at a smaller width."""
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


def vision_shapes(at: str) -> Iterator[tuple[str, tuple[int, ...]]]:
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


def make_checkpoint(folder: Path, gigabytes: float) -> tuple[int, int]:
    """Write shards of random bfloat16 values; bytes of the largest tensor and of the largest shard."""
    import torch

    layer_bytes = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN)
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * HIDDEN) / layer_bytes))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config(layers)))
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    largest = 0

    def flush() -> None:
        name = f"pytorch_model-{len(set(weight_map.values())) + 1:05}.bin"
        torch.save(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes(layers):
        tensor = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)
        size = tensor.nbytes
        if shard and sum(t.nbytes for t in shard.values()) + size > SHARD_BYTES:
            flush()
        shard[name], largest = tensor, max(largest, size)
    flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return largest, max(path.stat().st_size for path in folder.glob("*.bin"))


def config(layers: int) -> dict[str, object]:
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


def copy(source: Path, target: Path) -> float:
    """Seconds that ``cp`` takes for the same bytes, synced."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    subprocess.run(["sync", "-f", target], check=False)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def convert(source: Path, target: Path, options: list[str]) -> tuple[float, float]:
    """Seconds and peak resident megabytes of one conversion."""
    command = [
        sys.executable,
        "-m",
        "qwenvl_mlx.convert",
        "--hf-path",
        str(source),
        "--mlx-path",
        str(target),
    ]
    start = time.perf_counter()
    process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit("the conversion failed")
    unit = 1 if platform.system() == "Darwin" else 1024  # of ru_maxrss, in bytes
    return seconds, usage.ru_maxrss * unit / MEGABYTE


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, help="where to work (default: the temporary folder)")
    parser.add_argument("options", nargs="*", help="options of the conversion, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        source = Path(work, "source")
        # In its own process: a child's peak memory counts that of the process it was forked from.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            largest, shard = pool.submit(make_checkpoint, source, args.gigabytes).result()
        size = sum(path.stat().st_size for path in source.iterdir())
        copied = copy(source, Path(work, "copy"))
        seconds, peak = convert(source, Path(work, "mlx"), args.options)
    print(f"{platform.machine()} {platform.system()}, {size / 1e9:.2f} GB, options {args.options or 'none'}")
    print(
        f"peak {peak:.0f} MB; largest tensor {largest / MEGABYTE:.0f} MB, largest shard {shard / MEGABYTE:.0f} MB"
    )
    print(f"peak above the largest tensor: {peak - largest / MEGABYTE:.0f} MB (at most 300)")
    print(f"{seconds:.1f} s; cp {copied:.1f} s; ratio {seconds / copied:.2f}")


if __name__ == "__main__":
    main()
