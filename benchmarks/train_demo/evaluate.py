"""Ask a model about unseen scenes, free-running and greedy, through the engine: `python evaluate.py FOLDER`."""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from random import Random

from data import Dialogue, Scene, Turn, draw

from qwenvl_mlx import Engine, load
from qwenvl_mlx.engine import EngineOptions, GenerationOptions

MIX = ("shapes", "shapes", "number", "shapes", "pair", "video", "shapes", "number")


def right(turn: Turn, said: str, scene: Scene) -> bool:
    """The very words; for a box the right label and more than half of the union."""
    if turn.kind != "where":
        return said.strip() == turn.answer
    try:
        box, label = (json.loads(said)[0][key] for key in ("bbox_2d", "label"))
        true = [1000 * v / scene.picture.size[n % 2] for n, v in enumerate(turn.thing.box)]
        inner = [max(0, min(box[n + 2], true[n + 2]) - max(box[n], true[n])) for n in (0, 1)]
        union = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (box, true)) - inner[0] * inner[1]
        return label == json.loads(turn.answer)[0]["label"] and inner[0] * inner[1] > 0.5 * union
    except (ValueError, LookupError, TypeError):
        return False


def run(engine: Engine, scale: float, kind: str, scenes: list[Scene], dialogue: Dialogue) -> list[str]:
    """What the model says in one dialogue, with its own answers as its memory."""
    messages, told, frames = [], [], [f for scene in scenes for f in (scene.frames or [scene.picture])]
    seen = [f.resize((round(scale * f.width), round(scale * f.height))) for f in frames]
    media = [{"type": "image", "image": picture} for picture in seen]
    media = [{"type": "video", "video": seen, "fps": 2}] if kind == "video" else media
    for turn in dialogue:
        messages += [{"role": "user", "content": [*media, {"type": "text", "text": turn.question}]}]
        told.append(engine.generate(messages, GenerationOptions(max_tokens=64, temperature=0.0)).text)
        messages += [{"role": "assistant", "content": told[-1]}]
        media = []
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="or demo")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--scale", type=float, default=1.0, help="enlarge the pictures")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; without it that of the folder")
    args, tasks, groups = parser.parse_args(), [], {}
    for n in range(args.scenes):  # seeds that training never uses
        for kind in (MIX[n % len(MIX)], *(["talk"] if n % 20 == 0 else [])):
            _, (scenes,), (dialogues,) = draw(Random(f"evaluation {n}"), kind, 1)
            tasks += [(kind, scenes, dialogue) for dialogue in dialogues]
    engine = Engine(*load(args.folder, args.dtype), EngineOptions(max_queue=64))
    with engine, ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda task: run(engine, args.scale, *task), tasks)
        for (kind, scenes, dialogue), told in zip(tasks, answers, strict=True):
            for n, (turn, said) in enumerate(zip(dialogue, told, strict=True)):
                prefix = f"{kind}, " if kind in ("pair", "video") else ""
                good = right(turn, said, scenes[0] if scenes else None)
                groups.setdefault(prefix + ("second turn" if n else turn.kind), []).append(good)
                groups.setdefault("English" if turn.question.isascii() else "Chinese", []).append(good)
    for name, row in sorted(groups.items()):
        print(f"| {name} | {sum(row)}/{len(row)} | {100 * sum(row) / len(row):.1f} % |")


if __name__ == "__main__":
    main()
