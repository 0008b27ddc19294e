"""Ask a model folder about unseen scenes, free-running and greedy: `python evaluate.py FOLDER --backend torch`."""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from random import Random

from dialogues import talk
from PIL import Image
from questions import Turn, word
from scenes import Scene
from train import draw

Answer = Callable[[list[dict[str, object]], list[Image.Image]], str]
MIX = ("shapes", "shapes", "number", "shapes", "pair", "shapes", "number")


def with_torch(folder: str) -> Answer:
    """The reference: transformers with its own preprocessing, template and generate."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    pad = model.config.image_token_id

    def answer(messages: list[dict[str, object]], pictures: list[Image.Image]) -> str:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = processor(images=pictures, return_tensors="pt") if pictures else {}
        for _, high, wide in inputs.get("image_grid_thw", ()):
            text = text.replace("<|image_pad|>", "<|placeholder|>" * int(high * wide // 4), 1)
        ids = tokenizer(text.replace("<|placeholder|>", "<|image_pad|>"), return_tensors="pt")
        ids["mm_token_type_ids"] = (ids["input_ids"] == pad).long()
        out = model.generate(**ids, **inputs, max_new_tokens=60, do_sample=False)
        return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


def with_mlx(folder: str) -> Answer:
    """This package."""
    from qwenvl_mlx import generate, load

    model = load(folder)

    def answer(messages: list[dict[str, object]], pictures: list[Image.Image]) -> str:
        return generate(model, messages, images=pictures, max_tokens=60, temperature=0.0).text

    return answer


def overlap(first: list[float], second: list[float]) -> float:
    """Intersection over union of two boxes."""
    sides = [min(first[n + 2], second[n + 2]) - max(first[n], second[n]) for n in (0, 1)]
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (first, second)]
    inner = max(0, sides[0]) * max(0, sides[1])
    return inner / max(1e-9, sum(areas) - inner)


def right(turn: Turn, said: str, scenes: tuple[Scene, ...]) -> bool:
    """The very words; for a box the right label and more than half of the union."""
    if turn.kind != "where":
        return said.strip() == turn.answer
    try:
        found = json.loads(said)[0]
        box, label = [float(v) for v in found["bbox_2d"]], json.loads(turn.answer)[0]["label"]
    except (ValueError, LookupError, TypeError):
        return False
    names = {word(thing.name, lang): thing for thing in scenes[0].things for lang in ("en", "zh")}
    true = [1000 * v / scenes[0].picture.size[n % 2] for n, v in enumerate(names[label].box)]
    return found.get("label") == label and len(box) == 4 and overlap(box, true) > 0.5


def evaluate(answer: Answer, total: int, verbose: bool) -> dict[str, list[bool]]:
    """Right or wrong for every question, by kind."""
    rng, marks = Random("evaluation"), defaultdict(list)
    for n in range(total):
        kind = MIX[n % len(MIX)]
        _, rows, asked = draw(rng, kind, 1)
        scenes, dialogues = rows[0], rng.sample(asked[0][:-1] if kind != "pair" else asked[0], 3)
        if kind != "pair":
            dialogues += [asked[0][6]]
        for dialogue in [*dialogues, *([talk(rng, blind=True)] if n % 20 == 0 else [])]:
            blind = dialogue[0].kind == "talk"
            messages: list[dict[str, object]] = []
            for place, turn in enumerate(dialogue):
                media = [{"type": "image"} for _ in scenes] if not (place or blind) else []
                messages.append(
                    {"role": "user", "content": [*media, {"type": "text", "text": turn.question}]}
                )
                said = answer(messages, [] if blind else [scene.picture for scene in scenes])
                messages.append({"role": "assistant", "content": [{"type": "text", "text": said}]})
                group = (
                    "second turn"
                    if place
                    else "pair: " + turn.kind
                    if kind == "pair" and not blind
                    else turn.kind
                )
                marks[group].append(right(turn, said, scenes))
                if verbose and not marks[group][-1]:
                    print(group, "|", turn.question, "|", turn.answer, "|", said)
    return marks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--backend", choices=("torch", "mlx"), default="torch")
    parser.add_argument("--verbose", action="store_true", help="print wrong answers")
    args = parser.parse_args()
    began = time.time()
    answer = (with_torch if args.backend == "torch" else with_mlx)(args.folder)
    marks = evaluate(answer, args.scenes, args.verbose)
    print(f"{Path(args.folder).name}, {args.backend}, {args.scenes} scenes, {time.time() - began:.0f} s")
    for kind, row in sorted(marks.items()):
        print(f"| {kind} | {sum(row)}/{len(row)} | {100 * sum(row) / len(row):.1f} % |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
