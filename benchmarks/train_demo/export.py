"""Write a checkpoint as a model folder: `python export.py OUT/stage2.pt FOLDER` (which has the template)."""

import argparse
import json
from pathlib import Path
from random import Random

import torch
from model import config_dict
from safetensors.torch import save_file
from scenes import number_scene, shape_scene
from tokenizers import Tokenizer

PICTURE = {
    "image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor", "patch_size": 16,
    "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    "size": {"shortest_edge": 9216, "longest_edge": 65536},
}  # fmt: skip
VIDEO = PICTURE | {
    "image_processor_type": None, "video_processor_type": "Qwen3VLVideoProcessor", "fps": 2, "min_frames": 4,
    "max_frames": 16, "size": {"shortest_edge": 9216, "longest_edge": 524288},
}  # fmt: skip
SAMPLES = (("shapes-1", (5, 6)), ("shapes-2", (4, 7)), ("shapes-3", (7, 5)), ("shapes-4", (5, 5)),
           ("number-1", (4, 6)), ("number-2", (6, 6)))  # fmt: skip


def write_json(folder: Path, name: str, content: dict[str, object]) -> None:
    kept = {key: value for key, value in content.items() if value is not None}
    (folder / name).write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def export(checkpoint: Path, folder: Path) -> None:
    """All files of the folder but the chat template and the model card."""
    tokenizer = Tokenizer.from_file(str(checkpoint.parent / "tokenizer.json"))
    ids = tokenizer.token_to_id
    tokenizer.save(str(folder / "tokenizer.json"))
    weights = torch.load(checkpoint)["model"]
    kept = {k: v.to(torch.bfloat16).contiguous() for k, v in weights.items() if k != "lm_head.weight"}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    eos = [ids("<|im_end|>"), ids("<|endoftext|>")]
    pad = ids("<|endoftext|>")
    write_json(folder, "config.json", config_dict(tokenizer))
    write_json(folder, "generation_config.json",
               {"bos_token_id": pad, "pad_token_id": pad, "eos_token_id": eos, "do_sample": False})  # fmt: skip
    write_json(folder, "preprocessor_config.json", PICTURE)
    write_json(folder, "video_preprocessor_config.json", VIDEO)
    write_json(folder, "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "model_max_length": 4096, "clean_up_tokenization_spaces": False})  # fmt: skip


def samples(folder: Path) -> None:
    """Six pictures from a seed that training never uses."""
    folder.mkdir(exist_ok=True)
    rng = Random("samples")
    for name, grid in SAMPLES:
        make = number_scene if name.startswith("number") else shape_scene
        make(rng, grid).picture.save(folder / f"{name}.png", optimize=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    export(args.checkpoint, args.folder)
    samples(args.folder / "samples")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
