"""The tokenizer, the network, what its cells are taught, and how many dialogues about one picture lie in one row."""

from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import torch
from data import BIN, COLOURS, DATA, SHAPES, Dialogue, Grid, Scene, draw, shape_scene
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoTokenizer, Qwen3VLForConditionalGeneration

DEMO = Path(__file__).parents[2] / "qwenvl_mlx" / "demo"
END, IMAGE, VIDEO = "<|im_end|>", "<|image_pad|>", "<|video_pad|>"
NAMES, SIDES = [*SHAPES, "number"], ("x1", "y1", "x2", "y2")


def build_tokenizer() -> Tokenizer:
    """The shipped tokenizer's pattern and special tokens; merges until each piece of a question is one token."""
    rng, kinds = Random(1), ("shapes", "number", "pair", "video", "talk") * 1500
    asked = [turn for kind in kinds for dialogue in draw(rng, kind, 1)[2][0] for turn in dialogue]
    others = ["system\nuser\nassistant", "<0.5 seconds>", *(f"[{v}, {v}, {v}" for v in range(0, 1001, BIN))]
    texts = [text for turn in asked for text in turn[1:3]] + others * 40
    shipped = AutoTokenizer.from_pretrained(DEMO)
    return shipped.train_new_from_iterator(texts, 4000, show_progress=False).backend_tokenizer


def coordinate_ids(tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of 0..1000 as the first word of a box, and as a later one."""
    return [[tokenizer.token_to_id(f"{gap}{v}") for v in range(0, 1001, BIN)] for gap in ("", "Ġ")]


def waves(count: int, size: int) -> Tensor:
    """Sines and cosines of `count` values in 0..1, `size` columns: near values get near rows."""
    angles = torch.linspace(0, 1, count)[:, None] * torch.logspace(0, 1.5, size // 2)[None]
    return torch.cat([angles.sin(), angles.cos()], -1)


def build_model(tokenizer: Tokenizer) -> nn.Module:
    """Patch filters start as the main components of patches; tables of places and coordinates are smooth."""
    torch.manual_seed(0)
    model, rng = Qwen3VLForConditionalGeneration(AutoConfig.from_pretrained(DEMO)).float(), Random(2)
    visual, embed = model.model.visual, model.model.language_model.embed_tokens.weight
    rows = patches([shape_scene(rng, (4, 4)).picture for _ in range(200)], (4, 4))
    kernel, width, line = visual.patch_embed.proj, embed.shape[1], waves(16, embed.shape[1] // 2)
    values, vectors = torch.linalg.eigh(torch.cov(rows.T))
    filters = (vectors[:, -width:] / (values[-width:].clamp(min=0) + 0.03).sqrt()).T
    with torch.no_grad():
        kernel.weight.copy_(filters.reshape(width, 3, 1, 16, 16) / 2)
        kernel.bias.copy_(-filters @ rows.mean(0))
        visual.pos_embed.weight.copy_(torch.cat([line.repeat_interleave(16, 0), line.repeat(16, 1)], -1) / 2)
        for ids in coordinate_ids(tokenizer):
            embed[ids] = 0.05 * waves(len(ids), width) + 0.5 * embed[ids[:1]]
    # a still has two equal frames: one linear map of half the width, much faster than the convolution
    visual.patch_embed.forward = lambda x: linear(x, kernel.weight.sum(2).flatten(1), kernel.bias)
    return model


def patches(pictures: list[Image.Image], grid: Grid) -> Tensor:
    """Resize as the processor does; rows of 16x16 patches in 2x2 blocks, channel first."""
    size = 32 * grid[1], 32 * grid[0]
    pixels = np.stack([np.asarray(p.resize(size, Image.Resampling.BICUBIC), np.float32) for p in pictures])
    rows = torch.from_numpy(pixels / 127.5 - 1).reshape(-1, grid[0], 2, 16, grid[1], 2, 16, 3)
    return rows.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(-1, 768)


def see(model: nn.Module, pictures: list[Image.Image], grid: Grid) -> tuple[Tensor, ...]:
    """Features of pictures of one size, of the last block and of the DeepStack tap: [pictures, cells, width]."""
    sizes = torch.tensor([[1, 2 * grid[0], 2 * grid[1]]] * len(pictures))
    seen = model.model.visual(patches(pictures, grid), grid_thw=sizes)
    layers = seen.pooler_output, seen.deepstack_features[0]
    return tuple(layer.unflatten(0, (len(pictures), -1)) for layer in layers)


def label(scene: Scene, grid: Grid) -> dict[str, Tensor]:
    """Class of every cell for every head, -1 where it is not clear; coordinates in 0..40; digits are ranked too."""
    size, number, shown = scene.picture.size, scene.number, []
    things = scene.things * len(number) if number else scene.things
    for box in scene.digits or [t.box for t in things]:  # the share of each cell that lies in it
        edges = [np.arange(grid[n] + 1) * size[1 - n] / grid[n] for n in (0, 1)]
        inner = [np.minimum(e[1:], box[3 - n]) - np.maximum(e[:-1], box[1 - n]) for n, e in enumerate(edges)]
        shown.append(np.outer(*(part.clip(0) / e[1] for part, e in zip(inner, edges, strict=True))).ravel())
    parts = np.stack(shown)
    best, top, total = parts.argmax(0), parts.max(0), parts.sum(0)  # of each cell
    clear = (top > np.minimum(0.15, 0.7 * parts.max(1)[best])) & (total < 1.3 * top)
    values = {"shape": [NAMES.index(t.shape) for t in things], "rank": range(len(things)),
              "colour": [list(COLOURS).index(t.colour) for t in things]}  # fmt: skip
    values |= {side: [round(40 * t.box[n] / size[n % 2]) for t in things] for n, side in enumerate(SIDES)}
    for n in range(3):
        values[f"digit{n}"] = [int(number[m]) if number and m == n else -1 for m in range(len(things))]
    made = {name: np.where(clear, np.array(value)[best], -1) for name, value in values.items()}
    made |= {"count": 0 * best + (0 if number else len(things)), "length": 0 * best + len(number) - 1}
    return {name: torch.from_numpy(value) for name, value in made.items()}


class DenseHeads(nn.Module):
    """What every cell shows, taught to the vision tower: answers are read along the decoder's word embeddings."""

    def __init__(self, tokenizer: Tokenizer, width: int) -> None:
        super().__init__()
        self.words = {f"digit{n}": [tokenizer.encode("0123456789").ids] for n in range(3)}
        self.words |= {side: [coordinate_ids(tokenizer)[side != "x1"]] for side in SIDES}
        for name, languages in DATA["words"].items():
            self.words[name] = [[tokenizer.encode(word).ids[0] for word in words] for words in languages]
        self.maps = nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in self.words})

    def forward(self, features: Tensor, labels: list[dict[str, Tensor]], embed: Tensor) -> Tensor:
        """Mean loss over heads and languages for features [pictures, cells, width]."""
        losses = []
        for name, languages in self.words.items():
            told = torch.stack([one[name] for one in labels])
            mapped, told = self.maps[name](features[told >= 0]), told[told >= 0]
            for ids in languages if len(told) else ():
                near = -((torch.arange(len(ids)) - told[:, None]) ** 2) / 1.28  # coordinates share the target
                goal = near.softmax(-1) if name in SIDES else told
                losses.append(cross_entropy(mapped @ embed[ids].T, goal))
        return torch.stack(losses).mean()


class Packer:
    """Lays a picture (or two) and many dialogues in one row, in which no dialogue attends to another."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.encode = cache(lambda text: tokenizer.encode(text).ids)
        self.near = torch.arange(tokenizer.get_vocab_size()).repeat(3, 1)  # a word, and coordinates beside it
        for ids in coordinate_ids(tokenizer):
            self.near[1, ids[1:]], self.near[2, ids[:-1]] = torch.tensor(ids[:-1]), torch.tensor(ids[1:])

    def dialogue(self, turns: Dialogue) -> list[tuple[int, float]]:
        """Tokens of a dialogue, each with its weight as a target."""
        row, user, assistant = [], "", f"{END}\n<|im_start|>assistant\n"
        for turn in turns:
            row += [(token, 0.0) for text in (user, turn.question, assistant) for token in self.encode(text)]
            weight, user = DATA["weights"].get(turn.kind, 1.5), "\n<|im_start|>user\n"
            row += [(token, weight) for token in self.encode(turn.answer + END)]
        return row

    def pack(self, model: nn.Module, kind: str, grids: list[Grid], rows: list, rng: Random) -> Tensor:
        """Per token: itself, weight, owner (0: all dialogues) and three positions; [rows, tokens, 6]."""
        text = f"<|im_start|>system\nYou are a helpful assistant.{END}\n" if rng.random() < 0.1 else ""
        text, fps, packed = text + "<|im_start|>user\n", rng.choice([1, 2, 4]), []
        for n, (high, wide) in enumerate(grids):
            time = f"<{(2 * n + 0.5) / fps:.1f} seconds>" if kind == "video" else ""
            pads = (VIDEO if kind == "video" else IMAGE) * (high * wide)
            text += f"{time}<|vision_start|>{pads}<|vision_end|>"
        head, sizes = torch.tensor([self.encode(text)]), torch.tensor([[1, 2 * h, 2 * w] for h, w in grids])
        places = model.model.get_rope_index(head, self.pads(head).int(), sizes)[0][:, 0].T.tolist()
        first = max(map(max, places)) + 1
        for dialogues in rows:
            row = [(token, 0.0, 0, *place) for token, place in zip(head[0].tolist(), places, strict=True)]
            for n, turns in enumerate(dialogues, 1):
                row += [(*coded, n, *[first + k] * 3) for k, coded in enumerate(self.dialogue(turns))]
            packed.append(torch.tensor(row))
        return pad_sequence(packed, batch_first=True)

    def pads(self, ids: Tensor) -> Tensor:
        """Where the features of pictures go."""
        return (ids == self.encode(IMAGE)[0]) | (ids == self.encode(VIDEO)[0])

    def loss(self, model: nn.Module, packed: Tensor, seen: list[tuple[Tensor, ...]]) -> Tensor:
        """Weighted sum over the words of answers; a coordinate shares its target with its neighbours."""
        ids, weights, owners = packed[..., 0].long(), packed[..., 1], packed[..., 2]
        mask = ((owners[:, None] == 0) | (owners[:, None] == owners[:, :, None])).tril()[:, None]
        decoder, due, media = model.model.language_model, weights[:, 1:] > 0, {}
        embeds = decoder.embed_tokens(ids)
        if seen:
            last, tap = (torch.cat(parts, 1).flatten(0, 1) for parts in zip(*seen, strict=True))
            media = {"visual_pos_masks": self.pads(ids), "deepstack_visual_embeds": [tap]}
            embeds = embeds.masked_scatter(self.pads(ids)[..., None], last)
        media |= {"attention_mask": mask, "position_ids": packed[..., 3:].long().permute(2, 0, 1)}
        hidden = decoder(inputs_embeds=embeds, use_cache=False, **media).last_hidden_state[:, :-1][due]
        likely = linear(hidden, decoder.embed_tokens.weight).log_softmax(-1)
        shares = likely.gather(1, self.near[:, ids[:, 1:][due]].T) @ torch.tensor([0.7, 0.15, 0.15])
        return -(shares * weights[:, 1:][due]).sum()
