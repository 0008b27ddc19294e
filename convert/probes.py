"""A few pictures and texts that come with the package, to see what a conversion changes in a model's behaviour."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qwenvl_mlx.errors import PromptError
from qwenvl_mlx.media import Prompt
from qwenvl_mlx.processor.base import MediaOptions, Processor

PIXELS = 256 * 256
TEXTS = (
    "The harbour was quiet that morning. A red boat lay at the pier, its nets hung out to dry, and two gulls walked "
    "along the wall as if they owned it. Further out, the ferry blew its horn twice before it turned into the bay.",
    "To solve 3x + 7 = 22, subtract 7 from both sides, which gives 3x = 15, and divide by 3: x = 5. Check the result "
    "by putting it back into the equation: 3 * 5 + 7 = 22.",
    "春天来了，公园里的樱花开得正好。孩子们在草地上放风筝，老人坐在长椅上聊天，远处的湖面映着蓝天和白云。",
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n"
    "    return total / len(values)",
)
QUESTIONS = (
    "Describe this picture in detail: what is in the foreground, what is behind it, and which colours do you see?",
    "这张图片里有什么？请按照从左到右的顺序描述每一个物体的形状和颜色。",
)


CALIBRATION_TEXTS = (
    "Bread needs four things: flour, water, salt and time. Mix the first three in the evening, cover the bowl, and "
    "let the dough rise overnight. In the morning fold it twice, shape a loaf, and bake it until it is brown.",
    "The committee met on 14 March 2021 to discuss the budget. Revenue had grown by 12.5 percent, costs by 9.8 "
    "percent; the chair asked for a second estimate before any contract was signed.",
    "Light travels about 300,000 kilometres in a second. It takes eight minutes from the sun to the earth, four years "
    "to the next star, and a hundred thousand years across our galaxy.",
    "A: Is the museum open today? B: Yes, until six o'clock. Take the second street on the left, walk past the "
    "church, and you will see a tall building with green doors.",
    "北京是中国的首都，有三千多年的历史。故宫位于城市的中心，每年接待上千万名游客。秋天的香山红叶满山，是人们喜欢去的地方。",
    "人工智能正在改变我们的生活：手机可以识别照片里的物体，汽车能够自动驾驶，医生借助模型更早地发现疾病。",
    "Der Zug nach München fährt um 9:42 Uhr von Gleis 7. Reisende werden gebeten, ihre Plätze rechtzeitig einzunehmen.",
    "Le marché ouvre à sept heures. On y trouve des pommes, du fromage, des fleurs et parfois un musicien qui chante.",
    "import json\n\n\ndef load(path):\n    with open(path) as file:\n        rows = [json.loads(line) for line in file]"
    "\n    return {row['id']: row for row in rows if row['score'] > 0.5}",
    '{"name": "get_weather", "arguments": {"city": "Hangzhou", "unit": "celsius", "days": [1, 2, 3]}}',
)
CALIBRATION_QUESTIONS = (
    "What is shown here? Answer in one sentence.",
    "Count the objects and give the colour of each of them.",
    "Where is the largest object? Give its place in the picture.",
    "请详细描述这张图片。",
    "图中有几个圆形？它们是什么颜色？",
    "Is there anything red in this picture? Is it left or right of the middle?",
)


def probes(processor: Processor) -> Iterator[Prompt]:
    """What behaviours are compared on."""
    yield from _prompts(processor, TEXTS, QUESTIONS, seed=0)


def calibration(processor: Processor, file: Path | None = None) -> Iterator[Prompt]:
    """What quantising is calibrated on: other texts and pictures, or those of ``file``.

    ``file``: JSON, a list of texts and of conversations (lists of OpenAI-style messages). Raises ``PromptError``.
    """
    if file is None:
        yield from _prompts(processor, CALIBRATION_TEXTS, CALIBRATION_QUESTIONS, seed=100)
        return
    for item in _read(file):
        yield processor.raw(item) if isinstance(item, str) else processor(item)


def _prompts(
    processor: Processor, texts: Sequence[str], questions: Sequence[str], *, seed: int
) -> Iterator[Prompt]:
    """Plain texts, and questions about drawn pictures; without the latter where the checkpoint has no chat template."""
    for text in texts:
        yield processor.raw(text)
    for number, question in enumerate(questions, seed):
        parts = [{"type": "image", "image": picture(number)}, {"type": "text", "text": question}]
        try:
            yield processor([{"role": "user", "content": parts}], options=MediaOptions(max_pixels=PIXELS))
        except PromptError:
            return


def _read(file: Path) -> list[Any]:
    try:
        items = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PromptError(f"{file} can't be read ({error}): give a JSON file to --q-calibrate") from error
    if not isinstance(items, list) or not items or not all(isinstance(item, str | list) for item in items):
        raise PromptError(f"{file} is no list of texts and conversations: see --help")
    return items


def picture(seed: int) -> Image.Image:
    """A sky, a ground and some things of different shapes and colours; the same for the same seed."""
    random = np.random.default_rng(seed)
    height, width = 192, 256
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    canvas = np.stack([90 + y / 2, 140 + y / 3, 230 - y / 2], axis=-1)
    canvas[y > 120] = (70, 130, 60)
    for _ in range(6):
        colour, size = random.uniform(0, 255, 3), random.uniform(12, 40)
        dx, dy = x - random.uniform(0, width), y - random.uniform(40, height)
        inside = np.hypot(dx, dy) < size if random.random() < 0.5 else np.maximum(abs(dx), abs(dy)) < size
        canvas[inside] = colour
    noise = random.normal(0, 6, canvas.shape)
    return Image.fromarray(np.clip(canvas + noise, 0, 255).astype(np.uint8))
