"""What every cell of a picture shows, taught to the vision tower in the words of the decoder."""

import numpy as np
import torch
from model import coordinate_ids
from questions import CHINESE
from scenes import CELL, COLOURS, SHAPES, Grid, Scene
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

SIDES, DIGITS = ("x1", "y1", "x2", "y2"), ("digit1", "digit2", "digit3")
HEADS = ("shape", "colour", "rank", "count", "length", *SIDES, *DIGITS)
CLASSES = {
    "shape": ((*SHAPES, "number"), [CHINESE[name] for name in (*SHAPES, "number")]),
    "colour": (tuple(COLOURS), [CHINESE[name] for name in COLOURS]),
    "rank": (("one", "two", "three", "four"), "一两三四"),
    "count": (("no", "one", "two", "three", "four"), "没一两三四"),
    "length": (("one", "two", "three", "four"), "一两三四"),
}


def overlaps(boxes: np.ndarray, grid: Grid, size: tuple[int, int]) -> np.ndarray:
    """Area of each box (in pixels of the picture) inside each cell, [cells, boxes], as a share of a cell."""
    inner = []
    for axis, place in ((0, 1), (1, 0)):
        cell = np.divmod(np.arange(grid[0] * grid[1]), grid[1])[place].reshape(-1, 1)
        step = size[axis] / grid[place]
        ends = np.minimum(boxes[:, axis + 2], (cell + 1) * step), np.maximum(boxes[:, axis], cell * step)
        inner.append((ends[0] - ends[1]).clip(0))
    return inner[0] * inner[1] / CELL**2


def owners(cover: np.ndarray) -> np.ndarray:
    """The object each cell mainly shows, or -1 where that is ambiguous."""
    best, top = cover.argmax(1), cover.max(1)
    second = np.sort(cover, 1)[:, -2] if cover.shape[1] > 1 else 0 * top
    clear = (top > 0.15) & (second < 0.3 * top)
    clear |= (top == cover.max(0)[best]) & (top > 0.08) & (second < 0.5 * top)
    return np.where(clear, best, -1)


def label(scene: Scene, grid: Grid) -> dict[str, np.ndarray]:
    """Class of every cell for every head, -1 where nothing is asked; coordinates in 0..40."""
    size, things, cells = scene.picture.size, scene.things, grid[0] * grid[1]
    who = owners(overlaps(np.array([thing.box for thing in things], np.float32), grid, size))
    values = {
        "shape": [CLASSES["shape"][0].index(thing.shape) for thing in things],
        "colour": [CLASSES["colour"][0].index(thing.colour) for thing in things],
        "rank": [-1] if scene.number else range(len(things)),
    } | {side: [round(40 * thing.box[n] / size[n % 2]) for thing in things] for n, side in enumerate(SIDES)}
    made = {name: np.where(who >= 0, np.array(value)[who], -1) for name, value in values.items()}
    made["count"] = np.full(cells, 0 if scene.number else len(things))
    made["length"] = np.full(cells, len(scene.number) - 1)
    made |= {name: np.full(cells, -1) for name in DIGITS}
    for name, digit, box in zip(DIGITS, scene.number, scene.digits, strict=False):
        seen = overlaps(np.array([box], np.float32), grid, size)[:, 0]
        made[name] = np.where(seen > min(0.25, 0.7 * seen.max()), int(digit), -1)
    return made


class DenseHeads(nn.Module):
    """One small matrix per question; answers are read along the decoder's own word embeddings."""

    def __init__(self, tokenizer: Tokenizer, width: int) -> None:
        super().__init__()
        self.maps = nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in HEADS})
        self.words = {name: words(tokenizer, name) for name in HEADS}

    def forward(self, features: Tensor, labels: dict[str, Tensor], embed: Tensor) -> Tensor:
        """Mean loss over heads and languages; features and labels over [batch, cells]."""
        losses = []
        for name in HEADS:
            asked = labels[name] >= 0
            if asked.any():
                told, mapped = labels[name][asked], self.maps[name](features[asked])
                blur = 0.8 if name in SIDES else 0.0
                losses += [soft_loss(mapped @ embed[ids].T, told, blur) for ids in self.words[name]]
        return torch.stack(losses).mean()


def soft_loss(logits: Tensor, told: Tensor, blur: float) -> Tensor:
    """Cross-entropy; with `blur`, near classes share the target."""
    if not blur:
        return F.cross_entropy(logits, told)
    near = -((torch.arange(logits.shape[1])[None] - told[:, None]) ** 2) / (2 * blur**2)
    return F.cross_entropy(logits, near.softmax(-1))


def words(tokenizer: Tokenizer, head: str) -> list[list[int]]:
    """Token ids of a head's classes, in each language."""
    if head in SIDES:
        return [coordinate_ids(tokenizer)[head != "x1"]]
    english, chinese = CLASSES.get(head, ((), ()))
    texts = ["0123456789"] if head in DIGITS else [[f" {name}" for name in english], chinese]
    return [[tokenizer.encode(text).ids[0] for text in row] for row in texts]
