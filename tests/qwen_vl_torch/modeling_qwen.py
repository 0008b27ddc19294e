"""The original Qwen-VL in plain PyTorch, written from its description with the hub's names of modules.

A test lays these two files beside a tiny checkpoint, so that ``verify --trust-remote-code`` has code to run. No cache,
no batches, nothing fast.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_qwen import QWenConfig

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def resample(table, rows):
    source, target = math.isqrt(len(table)), math.isqrt(rows)
    image = table.float().reshape(1, source, source, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, (target, target), mode="bicubic", align_corners=False)
    return image.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)


class VisualAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.in_proj(x).unflatten(-1, (self.heads, -1)).transpose(0, 1).chunk(3, dim=-1)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))


class VisualBlock(nn.Module):
    def __init__(self, width, heads, inner):
        super().__init__()
        self.ln_1, self.ln_2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = VisualAttention(width, heads)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, inner), "c_proj": nn.Linear(inner, width)})

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Resampler(nn.Module):
    def __init__(self, queries, width, out):
        super().__init__()
        self.query, self.pos_embed = (nn.Parameter(torch.zeros(queries, out)) for _ in range(2))
        self.kv_proj = nn.Identity() if width == out else nn.Linear(width, out, bias=False)
        self.ln_q, self.ln_kv = (nn.LayerNorm(out, eps=1e-6) for _ in range(2))
        self.attn = nn.MultiheadAttention(out, out // 128)

    def forward(self, x):
        x = self.ln_kv(self.kv_proj(x))
        return self.attn(self.ln_q(self.query) + self.pos_embed, x + resample(self.pos_embed, len(x)), x)[0]


class Visual(nn.Module):
    def __init__(
        self, image_size, patch_size, width, layers, heads, mlp_ratio, output_dim, n_queries=256, **_
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.zeros(256, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(output_dim, eps=1e-6)
        blocks = [VisualBlock(width, heads, int(width * mlp_ratio)) for _ in range(layers)]
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(blocks)})
        self.attn_pool = Resampler(n_queries, width, output_dim)
        self.proj = nn.Parameter(torch.zeros(output_dim, output_dim))
        self.image_size = image_size

    def forward(self, path):
        with Image.open(path) as image:
            size = (self.image_size, self.image_size)
            pixels = np.array(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))
        pixels = (torch.tensor(pixels) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        x = self.conv1(pixels.permute(2, 0, 1)).flatten(1).T
        x = self.ln_pre(x + resample(self.positional_embedding, len(x)))
        for block in self.transformer["resblocks"]:
            x = block(x)
        return self.ln_post(self.attn_pool(x)) @ self.proj


class Norm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=not config.no_bias)

    def forward(self, x):
        config, length = self.config, len(x)
        heads = self.c_attn(x).unflatten(-1, (3, config.num_attention_heads, -1)).permute(1, 2, 0, 3)
        ratio = length / config.seq_length
        alpha = max(2 ** math.ceil(math.log2(ratio) + 1) - 1, 1) if config.use_dynamic_ntk else 1
        dims = config.kv_channels
        base = config.rotary_emb_base * alpha ** (dims / (dims - 2))
        angles = torch.outer(torch.arange(length), 1 / base ** (torch.arange(0, dims, 2) / dims)).repeat(1, 2)
        q, k = (t * angles.cos() + torch.cat((-t[..., dims // 2 :], t[..., : dims // 2]), -1) * angles.sin()
                for t in heads[:2])  # fmt: skip
        if config.use_logn_attn:
            logn = (torch.arange(1, length + 1).log() / math.log(config.seq_length)).clamp(min=1)
            q = q * logn[:, None]
        x = F.scaled_dot_product_attention(q[None], k[None], heads[2][None], is_causal=True)[0]
        return self.c_proj(x.transpose(0, 1).flatten(1))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size // 2, not config.no_bias
        self.ln_1, self.ln_2 = (Norm(width, config.layer_norm_epsilon) for _ in range(2))
        self.attn = Attention(config)
        shapes = {"w1": (width, inner), "w2": (width, inner), "c_proj": (inner, width)}
        self.mlp = nn.ModuleDict({name: nn.Linear(*shape, bias=bias) for name, shape in shapes.items()})

    def forward(self, hidden_states):
        x = hidden_states + self.attn(self.ln_1(hidden_states)[0])
        y = self.ln_2(x)
        return x + self.mlp["c_proj"](self.mlp["w1"](y) * F.silu(self.mlp["w2"](y)))


class QWenModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.start = config.visual["image_start_id"]
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.ln_f = Norm(config.hidden_size, config.layer_norm_epsilon)
        self.visual = Visual(**config.visual)

    def forward(self, ids):
        x = self.wte(ids)
        for first in (ids[0] == self.start).nonzero().flatten().tolist():
            last = first + ids[0, first:].tolist().index(self.start + 1)
            path = bytes(token for token in ids[0, first + 1 : last].tolist() if token < 256).decode()
            x[0, first + 1 : last] = self.visual(path)
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


class QWenLMHeadModel(PreTrainedModel):
    config_class = QWenConfig

    def __init__(self, config):
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **_):
        return CausalLMOutput(logits=self.lm_head(self.transformer(input_ids)))
