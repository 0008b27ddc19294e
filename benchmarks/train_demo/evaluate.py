"""Ask a model about unseen scenes, free-running and greedy, through the engine: `python evaluate.py FOLDER`."""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random

from questions import Dialogue, Turn, draw
from scenes import Box, Scene

from qwenvl_mlx import Engine, load
from qwenvl_mlx.engine import EngineOptions, GenerationOptions

MIX = ("shapes", "shapes", "number", "shapes", "pair", "video", "shapes", "number")
Mark = tuple[str, Turn, str, bool]  # group, asked, said, right


def overlap(first: Box, second: Box) -> float:
    """Intersection over union of two boxes."""
    inner = [max(0, min(first[n + 2], second[n + 2]) - max(first[n], second[n])) for n in (0, 1)]
    areas = sum(max(0, b[2] - b[0]) * max(0, b[3] - b[1]) for b in (first, second))
    return inner[0] * inner[1] / max(1e-9, areas - inner[0] * inner[1])


def right(turn: Turn, said: str, scenes: list[Scene]) -> bool:
    """The very words; for a box the right label and more than half of the union."""
    if turn.kind != "where":
        return said.strip() == turn.answer
    try:
        box, label = (json.loads(said)[0][key] for key in ("bbox_2d", "label"))
        true = [1000 * v / scenes[0].picture.size[n % 2] for n, v in enumerate(turn.thing.box)]
        return label == json.loads(turn.answer)[0]["label"] and overlap(box, true) > 0.5
    except (ValueError, LookupError, TypeError):
        return False


def run(engine: Engine, kind: str, scenes: list[Scene], dialogue: Dialogue) -> Iterator[Mark]:
    """One dialogue, with the model's own answers as its memory."""
    messages = []
    for place, turn in enumerate(dialogue):
        pictures = [{"type": "image", "image": scene.picture} for scene in scenes if not place]
        if kind == "video" and not place:
            pictures = [{"type": "video", "video": [f for scene in scenes for f in scene.frames], "fps": 2}]
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": turn.question}]})
        said = engine.generate(messages, GenerationOptions(max_tokens=64, temperature=0.0)).text
        messages.append({"role": "assistant", "content": said})
        group = (f"{kind}, " if kind in ("pair", "video") else "") + ("second turn" if place else turn.kind)
        yield group, turn, said, right(turn, said, scenes)


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
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; without it that of the folder")
    parser.add_argument("--verbose", action="store_true", help="print wrong answers")
    args = parser.parse_args()
    groups: dict[str, list[bool]] = defaultdict(list)
    engine = Engine(*load(args.folder, args.dtype), EngineOptions(max_queue=10**6))
    with engine, ThreadPoolExecutor(8) as pool:
        for marks in pool.map(lambda task: list(run(engine, *task)), tasks(args.scenes)):
            for group, turn, said, good in marks:
                groups[group].append(good)
                groups["English" if turn.question.isascii() else "Chinese"].append(good)
                if args.verbose and not good:
                    print(group, "|", turn.question, "|", turn.answer, "|", said)
    for name, row in sorted(groups.items()):
        print(f"| {name} | {sum(row)}/{len(row)} | {100 * sum(row) / len(row):.1f} % |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
