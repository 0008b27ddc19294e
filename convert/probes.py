"""A few pictures and texts that come with the package, to see what a conversion changes in a model's behaviour."""

from __future__ import annotations

from collections.abc import Iterator

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


def probes(processor: Processor) -> Iterator[Prompt]:
    """Plain texts, and questions about drawn pictures; without the latter where the checkpoint has no chat template."""
    for text in TEXTS:
        yield processor.raw(text)
    for seed, question in enumerate(QUESTIONS):
        parts = [{"type": "image", "image": picture(seed)}, {"type": "text", "text": question}]
        try:
            yield processor([{"role": "user", "content": parts}], options=MediaOptions(max_pixels=PIXELS))
        except PromptError:
            return


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
