"""The published sizes of every generation, as the ``config.json`` that their checkpoints carry.

For telling what fits a machine and for timing true shapes with random weights; nothing here is needed to load a
checkpoint, which brings its own file.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]


def _qwen_vl() -> Config:
    visual = {
        "image_size": 448,
        "patch_size": 14,
        "width": 1664,
        "layers": 48,
        "heads": 16,
        "mlp_ratio": 4.9231,
    }
    return {
        "model_type": "qwen",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "kv_channels": 128,
        "num_hidden_layers": 32,
        "intermediate_size": 22016,
        "layer_norm_epsilon": 1e-6,
        "seq_length": 2048,
        "max_position_embeddings": 8192,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "no_bias": True,
        "tie_word_embeddings": False,
        "scale_attn_weights": True,
        "visual": {**visual, "output_dim": 4096, "image_start_id": 151857},
    }


def _decoder(
    hidden: int, inter: int, layers: int, heads: int, kv: int, *, tie: bool = False, vocab: int = 151936
) -> Config:
    return {
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "tie_word_embeddings": tie,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
    }


_IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
_MROPE = {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}


def _qwen2_vl(decoder: Config) -> Config:
    vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "in_chans": 3}
    patches = {"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}
    vision_config = {**vision, **patches, "hidden_size": decoder["hidden_size"]}
    return {"model_type": "qwen2_vl", **decoder, **_MROPE, **_IDS, "vision_config": vision_config}


def _qwen2_5_vl(decoder: Config, *, vision_inter: int = 3420, depth: int = 32, width: int = 1280) -> Config:
    every = depth // 4
    vision_config = {
        "depth": depth,
        "hidden_size": width,
        "intermediate_size": vision_inter,
        "num_heads": width // 80,
        "hidden_act": "silu",
        "in_chans": 3,
        "out_hidden_size": decoder["hidden_size"],
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [every * (i + 1) - 1 for i in range(4)],
        "tokens_per_second": 2,
    }
    context = {"max_position_embeddings": 128000}
    return {
        "model_type": "qwen2_5_vl",
        **decoder,
        **context,
        **_MROPE,
        **_IDS,
        "vision_config": vision_config,
    }


_SMALL_TOWER = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096}
_LARGE_TOWER = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304}


def _nested(
    kind: str, text: Config, tower: Config, *, taps: list[int], heads: int = 16, first_id: int = 151652
) -> Config:
    vision_config = {
        **tower,
        "num_heads": heads,
        "hidden_act": "gelu_pytorch_tanh",
        "in_channels": 3,
        "out_hidden_size": text["hidden_size"],
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": taps,
    }
    ids = {name: value - _IDS["vision_start_token_id"] + first_id for name, value in _IDS.items()}
    tie = text["tie_word_embeddings"]
    return {
        "model_type": kind,
        "text_config": {"model_type": f"{kind}_text", **text},
        "tie_word_embeddings": tie,
        **ids,
        "vision_config": vision_config,
    }


def _qwen3_text(decoder: Config, **more: Any) -> Config:
    scaling = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]}
    rope = {"rope_theta": 5e6, "rope_scaling": scaling, "max_position_embeddings": 262144}
    return {**decoder, "head_dim": 128, "attention_bias": False, **rope, **more}


def _qwen3_vl(decoder: Config, *, large_tower: bool) -> Config:
    tower, taps = (_LARGE_TOWER, [8, 16, 24]) if large_tower else (_SMALL_TOWER, [5, 11, 17])
    return _nested("qwen3_vl", _qwen3_text(decoder), tower, taps=taps)


def _qwen3_vl_moe(decoder: Config, *, expert: int) -> Config:
    experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": expert}
    routing = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
    text = _qwen3_text(decoder, **experts, **routing)
    return _nested("qwen3_vl_moe", text, _LARGE_TOWER, taps=[8, 16, 24])


def _qwen3_5(decoder: Config, *, keys: int, values: int, large_tower: bool = True, **more: Any) -> Config:
    layers = decoder["num_hidden_layers"]
    kinds = ["full_attention" if (i + 1) % 4 == 0 else "linear_attention" for i in range(layers)]
    rope = {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_interleaved": True,
    }
    text = {
        **decoder,
        "head_dim": 256,
        "attention_bias": False,
        "attn_output_gate": True,
        "full_attention_interval": 4,
        "layer_types": kinds,
        "linear_conv_kernel_dim": 4,
        "linear_num_key_heads": keys,
        "linear_num_value_heads": values,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "partial_rotary_factor": 0.25,
        "rope_parameters": {**rope, "mrope_section": [11, 11, 10]},
        **more,
    }
    kind = "qwen3_5_moe" if "num_experts" in more else "qwen3_5"
    return _nested(kind, text, _LARGE_TOWER if large_tower else _SMALL_TOWER, taps=[], first_id=248053)


_V2 = 152064
_V35 = 248320
_EXPERTS_35: Config = {
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}

SIZES: dict[str, Config] = {
    "Qwen-VL-Chat": _qwen_vl(),
    "Qwen2-VL-2B": _qwen2_vl(_decoder(1536, 8960, 28, 12, 2, tie=True)),
    "Qwen2-VL-7B": _qwen2_vl(_decoder(3584, 18944, 28, 28, 4, vocab=_V2)),
    "Qwen2-VL-72B": _qwen2_vl(_decoder(8192, 29568, 80, 64, 8, vocab=_V2)),
    "Qwen2.5-VL-3B": _qwen2_5_vl(_decoder(2048, 11008, 36, 16, 2, tie=True)),
    "Qwen2.5-VL-7B": _qwen2_5_vl(_decoder(3584, 18944, 28, 28, 4, vocab=_V2)),
    "Qwen2.5-VL-32B": _qwen2_5_vl(_decoder(5120, 27648, 64, 40, 8, vocab=_V2), vision_inter=3456),
    "Qwen2.5-VL-72B": _qwen2_5_vl(_decoder(8192, 29568, 80, 64, 8, vocab=_V2), vision_inter=3456),
    "Qwen3-VL-2B": _qwen3_vl(_decoder(2048, 6144, 28, 16, 8, tie=True), large_tower=False),
    "Qwen3-VL-4B": _qwen3_vl(_decoder(2560, 9728, 36, 32, 8, tie=True), large_tower=False),
    "Qwen3-VL-8B": _qwen3_vl(_decoder(4096, 12288, 36, 32, 8), large_tower=True),
    "Qwen3-VL-32B": _qwen3_vl(_decoder(5120, 25600, 64, 64, 8), large_tower=True),
    "Qwen3-VL-30B-A3B": _qwen3_vl_moe(_decoder(2048, 6144, 48, 32, 4), expert=768),
    "Qwen3-VL-235B-A22B": _qwen3_vl_moe(_decoder(4096, 12288, 94, 64, 4), expert=1536),
    "Qwen3.5-2B": _qwen3_5(
        _decoder(2048, 6144, 24, 8, 2, tie=True, vocab=_V35), keys=16, values=16, large_tower=False
    ),
    "Qwen3.5-27B": _qwen3_5(_decoder(5120, 17408, 64, 24, 4, vocab=_V35), keys=16, values=48),
    "Qwen3.5-35B-A3B": _qwen3_5(
        _decoder(2048, 512, 40, 16, 2, vocab=_V35), keys=16, values=32, **_EXPERTS_35
    ),
}


def small_shapes() -> dict[str, Config]:
    """About 250 million parameters each: the generations' true structure at a size that any machine can time."""
    decoder = _decoder(1024, 2816, 12, 8, 2, tie=True, vocab=32000)
    ids = {"image_token_id": 31655, "video_token_id": 31656, "vision_start_token_id": 31652}
    end = {"vision_end_token_id": 31653}
    tower = {"depth": 12, "hidden_size": 640, "intermediate_size": 1720}
    return {
        "qwen2.5-vl-250m": {**_qwen2_5_vl(decoder, vision_inter=1720, depth=12, width=640), **ids, **end},
        "qwen3-vl-250m": {
            **_nested("qwen3_vl", _qwen3_text(decoder), tower, taps=[2, 5, 8], heads=10),
            **ids,
            **end,
        },
    }
