"""What every cell of a picture shows, taught to the vision tower in the words of the decoder."""

import numpy as np
import torch
from model import coordinate_ids
from questions import CHINESE
from scenes import COLOURS, SHAPES, Box, Grid, Scene
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

NAMES, COUNTS, SIDES = [*SHAPES, "number"], ["one", "two", "three", "four"], ("x1", "y1", "x2", "y2")
WORDS = {"shape": (NAMES, [CHINESE[n] for n in NAMES]), "rank": (COUNTS, "一两三四"), "length": (COUNTS, "一两三四"),
         "colour": ([*COLOURS], [CHINESE[n] for n in COLOURS]), "count": (["no", *COUNTS], "没一两三四")}  # fmt: skip


def cover(box: Box, grid: Grid, size: tuple[int, int]) -> np.ndarray:
    """Which share of each cell lies in the box."""
    shares = []
    for axis, count in ((1, grid[0]), (0, grid[1])):
        edges = np.arange(count + 1) * size[axis] / count
        inner = np.minimum(edges[1:], box[axis + 2]) - np.maximum(edges[:-1], box[axis])
        shares.append(inner.clip(0) / edges[1])
    return np.outer(*shares).ravel()


def label(scene: Scene, grid: Grid) -> dict[str, Tensor]:
    """Class of every cell for every head, -1 where it is not clear; coordinates in 0..40; digits are ranked too."""
    size, number = scene.picture.size, scene.number
    things = scene.things * len(number) if number else scene.things
    shown = np.stack([cover(box, grid, size) for box in scene.digits or [t.box for t in things]])
    best, top, total = shown.argmax(0), shown.max(0), shown.sum(0)  # of each cell; shown is [parts, cells]
    clear = (top > np.minimum(0.15, 0.7 * shown.max(1)[best])) & (total < 1.3 * top)
    values = {"shape": [NAMES.index(t.shape) for t in things], "rank": range(len(things)),
              "colour": [list(COLOURS).index(t.colour) for t in things]}  # fmt: skip
    values |= {side: [round(40 * t.box[n] / size[n % 2]) for t in things] for n, side in enumerate(SIDES)}
    for n in range(3):
        values[f"digit{n}"] = [int(number[m]) if number and m == n else -1 for m in range(len(things))]
    made = {name: np.where(clear, np.array(value)[best], -1) for name, value in values.items()}
    made |= {"count": 0 * best + (0 if number else len(things)), "length": 0 * best + len(number) - 1}
    return {name: torch.from_numpy(value) for name, value in made.items()}


class DenseHeads(nn.Module):
    """One small matrix per question; answers are read along the decoder's own word embeddings."""

    def __init__(self, tokenizer: Tokenizer, width: int) -> None:
        super().__init__()
        digits = [[tokenizer.token_to_id(digit) for digit in "0123456789"]]
        self.words = {f"digit{n}": digits for n in range(3)}
        self.words |= {side: [coordinate_ids(tokenizer)[side != "x1"]] for side in SIDES}
        for name, (english, chinese) in WORDS.items():
            texts = [f" {word}" for word in english], chinese
            self.words[name] = [[tokenizer.encode(text).ids[0] for text in row] for row in texts]
        self.maps = nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in self.words})

    def forward(self, features: Tensor, labels: list[dict[str, Tensor]], embed: Tensor) -> Tensor:
        """Mean loss over heads and languages for features [pictures, cells, width]."""
        losses = []
        for name, languages in self.words.items():
            told = torch.stack([one[name] for one in labels])
            mapped, told = self.maps[name](features[told >= 0]), told[told >= 0]
            for ids in languages if len(told) else ():
                near = -((torch.arange(len(ids)) - told[:, None]) ** 2) / 1.28  # coordinates share the target
                losses.append(
                    cross_entropy(mapped @ embed[ids].T, near.softmax(-1) if name in SIDES else told)
                )
        return torch.stack(losses).mean()
