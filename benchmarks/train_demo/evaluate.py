"""Ask a model about unseen scenes, free-running and greedy, through the engine: `python evaluate.py FOLDER`."""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random

from PIL import Image
from questions import Dialogue, Turn, draw
from scenes import Scene

from qwenvl_mlx import Engine, load
from qwenvl_mlx.engine import EngineOptions, GenerationOptions

MIX = ("shapes", "shapes", "number", "shapes", "pair", "video", "shapes", "number")


def right(turn: Turn, said: str, scenes: list[Scene]) -> bool:
    """The very words; for a box the right label and more than half of the union."""
    if turn.kind != "where":
        return said.strip() == turn.answer
    try:
        box, label = (json.loads(said)[0][key] for key in ("bbox_2d", "label"))
        true = [1000 * v / scenes[0].picture.size[n % 2] for n, v in enumerate(turn.thing.box)]
        inner = [max(0, min(box[n + 2], true[n + 2]) - max(box[n], true[n])) for n in (0, 1)]
        union = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (box, true)) - inner[0] * inner[1]
        return label == json.loads(turn.answer)[0]["label"] and inner[0] * inner[1] > 0.5 * union
    except (ValueError, LookupError, TypeError):
        return False


def run(engine: Engine, scale: float, kind: str, scenes: list[Scene], dialogue: Dialogue) -> list[str]:
    """What the model says in one dialogue, with its own answers as its memory."""
    messages, told = [], []
    frames = [frame for scene in scenes for frame in (scene.frames or [scene.picture])]
    seen: list[Image.Image] = [f.resize((round(scale * f.width), round(scale * f.height))) for f in frames]
    media = [{"type": "image", "image": picture} for picture in seen]
    media = [{"type": "video", "video": seen, "fps": 2}] if kind == "video" else media
    for turn in dialogue:
        parts = [*([] if told else media), {"type": "text", "text": turn.question}]
        messages.append({"role": "user", "content": parts})
        told.append(engine.generate(messages, GenerationOptions(max_tokens=64, temperature=0.0)).text)
        messages.append({"role": "assistant", "content": told[-1]})
    return told


def tasks(total: int) -> Iterator[tuple[str, list[Scene], Dialogue]]:
    """All dialogues about each of so many scenes; seeds that training never uses."""
    for n in range(total):
        for kind in (MIX[n % len(MIX)], *(["talk"] if n % 20 == 0 else [])):
            _, (scenes,), (dialogues,) = draw(Random(f"evaluation {n}"), kind, 1)
            yield from ((kind, scenes, dialogue) for dialogue in dialogues)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="or demo")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--scale", type=float, default=1.0, help="enlarge the pictures")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; without it that of the folder")
    parser.add_argument("--verbose", action="store_true", help="print wrong answers")
    args = parser.parse_args()
    groups: dict[str, list[bool]] = defaultdict(list)
    asked, engine = (
        list(tasks(args.scenes)),
        Engine(*load(args.folder, args.dtype), EngineOptions(max_queue=64)),
    )
    with engine, ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda task: run(engine, args.scale, *task), asked)
        for (kind, scenes, dialogue), told in zip(asked, answers, strict=True):
            for n, (turn, said) in enumerate(zip(dialogue, told, strict=True)):
                good, prefix = right(turn, said, scenes), f"{kind}, " if kind in ("pair", "video") else ""
                groups[prefix + ("second turn" if n else turn.kind)].append(good)
                groups["English" if turn.question.isascii() else "Chinese"].append(good)
                if args.verbose and not good:
                    print(turn, "|", said)
    for name, row in sorted(groups.items()):
        print(f"| {name} | {sum(row)}/{len(row)} | {100 * sum(row) / len(row):.1f} % |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
