"""The network, its batched forward over pictures of one size, and the packing of many questions into one row."""

import json
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import torch
from questions import BIN, Dialogue
from scenes import Grid
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3VLConfig
from transformers import Qwen3VLForConditionalGeneration as Network

DEMO = Path(__file__).parents[2] / "qwenvl_mlx" / "demo"
WEIGHTS = {
    "is_there": 3.0,
    "more": 3.0,
    "which": 3.0,
    "where": 1.0,
    "describe": 0.7,
    "pair_describe": 0.7,
    "talk": 0.3,
}
Features = tuple[Tensor, Tensor]  # of the last block, of the DeepStack tap: [batch, cells, width]


def config_dict(tokenizer: Tokenizer) -> dict[str, object]:
    """The shipped config with this tokenizer's ids."""
    config = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    for name in ("image", "video"):
        config[f"{name}_token_id"] = tokenizer.token_to_id(f"<|{name}_pad|>")
    for name in ("start", "end"):
        config[f"vision_{name}_token_id"] = tokenizer.token_to_id(f"<|vision_{name}|>")
    text = config["text_config"]
    text["bos_token_id"], text["eos_token_id"] = map(tokenizer.token_to_id, ("<|endoftext|>", "<|im_end|>"))
    text["vocab_size"] = -(-tokenizer.get_vocab_size() // 64) * 64
    return config


def waves(values: Tensor, size: int) -> Tensor:
    """Sines and cosines of values in 0..1, `size` columns: near values get near rows."""
    angles = values[:, None] * torch.logspace(0, 1.5, size // 2)[None]
    return torch.cat([angles.sin(), angles.cos()], -1)


def coordinate_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Token ids of 0..1000 as the first word of a box, and as a later one."""
    words = range(0, 1001, BIN)
    return [tokenizer.token_to_id(f"{v}") for v in words], [tokenizer.token_to_id(f"Ġ{v}") for v in words]


def build_model(tokenizer: Tokenizer, rows: Tensor) -> Network:
    """A fresh network; patch filters from the main components of `rows` of patches, smooth position tables."""
    torch.manual_seed(0)
    model = Network(Qwen3VLConfig.from_dict(config_dict(tokenizer))).float()
    visual, embed = model.model.visual, model.model.language_model.embed_tokens
    kernel, width = visual.patch_embed.proj, visual.config.hidden_size
    values, vectors = torch.linalg.eigh(torch.cov(rows.T))
    filters = vectors[:, -width:] / (values[-width:].clamp(min=0) + 0.03).sqrt()
    line = torch.linspace(0, 1, 16)
    with torch.no_grad():
        kernel.weight.copy_(filters.T.reshape(width, 3, 1, 16, 16).expand(-1, -1, 2, -1, -1) / 2)
        kernel.bias.copy_(-filters.T @ rows.mean(0))
        table = [waves(line.repeat_interleave(16), width // 2), waves(line.repeat(16), width // 2)]
        visual.pos_embed.weight.copy_(0.5 * torch.cat(table, -1))
        for ids in coordinate_ids(tokenizer):
            embed.weight[ids] = (
                0.05 * waves(torch.linspace(0, 1, len(ids)), width) + 0.5 * embed.weight[ids[:1]]
            )
    # a still has two equal frames: one linear map of half the width, much faster than the convolution
    visual.patch_embed.forward = lambda x: F.linear(x, kernel.weight.sum(2).flatten(1), kernel.bias)
    return model


def see(model: Network, pixels: Tensor, grid: Grid) -> Features:
    """Features of a batch of pictures of one size."""
    batch = len(pixels)
    sizes = torch.tensor([[1, 2 * grid[0], 2 * grid[1]]] * batch)
    seen = model.model.visual(pixels.flatten(0, 1), grid_thw=sizes)
    return seen.pooler_output.unflatten(0, (batch, -1)), seen.deepstack_features[0].unflatten(0, (batch, -1))


class Packer:
    """Lay a picture (or two) and many dialogues in one row; no dialogue attends to another."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.encode = cache(lambda text: tokenizer.encode(text).ids)
        self.lower, self.upper = (torch.arange(tokenizer.get_vocab_size()) for _ in range(2))
        for ids in coordinate_ids(tokenizer):
            self.lower[ids[1:]], self.upper[ids[:-1]] = torch.tensor(ids[:-1]), torch.tensor(ids[1:])

    def prefix(self, grids: list[Grid], system: bool) -> tuple[list[int], np.ndarray]:
        """Tokens before the first question, and their three positions."""
        first = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" if system else ""
        ids = [*self.encode(f"{first}<|im_start|>user\n")]
        places, start = [np.tile(np.arange(len(ids)), (3, 1))], len(ids)
        for high, wide in grids:
            ids += self.encode("<|vision_start|>" + "<|image_pad|>" * (high * wide) + "<|vision_end|>")
            row, column = np.divmod(np.arange(high * wide), wide)
            after = start + 1 + max(high, wide)
            places += [
                np.full((3, 1), start),
                start + 1 + np.stack([row * 0, row, column]),
                np.full((3, 1), after),
            ]
            start = after + 1
        return ids, np.concatenate(places, 1)

    def dialogue(self, turns: Dialogue) -> tuple[list[int], list[float]]:
        """Tokens of a dialogue and the weight of each as a target."""
        ids: list[int] = []
        weights: list[float] = []
        for n, (kind, question, answer) in enumerate(turns):
            again = "\n<|im_start|>user\n" if n else ""
            asked = (
                self.encode(again)
                + self.encode(question)
                + self.encode("<|im_end|>\n<|im_start|>assistant\n")
            )
            told = self.encode(answer) + self.encode("<|im_end|>")
            ids += asked + told
            weights += [0.0] * len(asked) + [WEIGHTS.get(kind, 1.5)] * len(told)
        return ids, weights

    def pack(self, grids: list[Grid], batch: list[list[Dialogue]], rng: Random) -> dict[str, Tensor]:
        """Tensors for a batch whose pictures have the same sizes."""
        head, places = self.prefix(grids, system=rng.random() < 0.1)
        rows = []
        for dialogues in batch:
            coded = [self.dialogue(turns) for turns in dialogues]
            after = [places[:, -1:] + 1 + np.arange(len(ids)) for ids, _ in coded]
            owner = [n + 1 for n, (ids, _) in enumerate(coded) for _ in ids]
            ids, weights = (
                head + [token for ids, _ in coded for token in ids],
                [0.0] * len(head) + [weight for _, weights in coded for weight in weights],
            )
            rows.append((ids, weights, [0] * len(head) + owner, np.concatenate([places, *after], 1).T))
        names, empty = ("ids", "weights", "owner", "positions"), (0, 0, -1, 0)
        packed = {
            name: pad_sequence([torch.tensor(part) for part in column], batch_first=True, padding_value=fill)
            for name, column, fill in zip(names, zip(*rows, strict=True), empty, strict=True)
        }
        owner = packed["owner"]
        mask = ((owner[:, None, :] == 0) | (owner[:, None, :] == owner[:, :, None])).tril()
        visual = packed["ids"] == self.encode("<|image_pad|>")[0]
        return packed | {
            "mask": mask[:, None],
            "visual": visual,
            "positions": packed["positions"].permute(2, 0, 1),
        }


def answer_logits(
    model: Network, packed: dict[str, Tensor], seen: list[Features]
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-likelihoods of all words where an answer is due, with the true words and their weights."""
    decoder = model.model.language_model
    embeds, media = decoder.embed_tokens(packed["ids"]), {}
    if seen:
        merged, deep = (torch.cat(parts, 1).flatten(0, 1) for parts in zip(*seen, strict=True))
        embeds = embeds.masked_scatter(packed["visual"][..., None], merged)
        media = {"visual_pos_masks": packed["visual"], "deepstack_visual_embeds": [deep]}
    masks = {"attention_mask": packed["mask"], "position_ids": packed["positions"]}
    hidden = decoder(inputs_embeds=embeds, use_cache=False, **masks, **media).last_hidden_state
    due = packed["weights"][:, 1:] > 0
    logits = F.linear(hidden[:, :-1][due], decoder.embed_tokens.weight)
    return logits.log_softmax(-1), packed["ids"][:, 1:][due], packed["weights"][:, 1:][due]


def answer_loss(packer: Packer, likely: Tensor, words: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over answers; a coordinate shares its target with its neighbours."""
    near = likely.gather(1, packer.lower[words][:, None]) + likely.gather(1, packer.upper[words][:, None])
    loss = 0.7 * likely.gather(1, words[:, None]) + 0.15 * near
    return -(loss[:, 0] * weights).sum()
