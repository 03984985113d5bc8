"""Llama 4, text: weighted inputs, chunks, layers without positions, norms that learn nothing."""

from typing import Any

from helpers_parity import EVERYWHERE, Case, no_shared_experts, on_layers, on_moe
from torch import nn

from moe_builders.attention.temperature import PositionTemperature
from moe_builders.families.llama4 import llama4_maverick_17b_128e, llama4_scout_17b_16e

RELEASES = [
    ("Llama-4-Scout-17B-16E-Instruct", llama4_scout_17b_16e, 107_769_861_120, "17.17"),
    ("Llama-4-Maverick-17B-128E-Instruct", llama4_maverick_17b_128e, 400_711_848_960, "17.18"),
]
_SCOUT_ROPE = {
    "rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "attention_factor": 1.5,
    "original_max_position_embeddings": 16,
}  # fmt: skip
_ROWS = "transformers counts chunks and temperature by place in the row, not by position"


def _norms_everywhere(model: Any) -> None:
    for layer in model.layers:
        layer.attn.q_norm = layer.attn.k_norm = nn.RMSNorm(16, eps=1e-5, elementwise_affine=False)


def _rope_everywhere(model: Any) -> None:
    for layer in model.layers:
        layer.attn.rope = model.layers[0].attn.rope


def _halves(layer: Any) -> None:
    if layer.attn.rope is not None:
        layer.attn.rope.interleaved = False


CASE = Case(
    model_type="llama4_text",
    hf_model="Llama4ForCausalLM",
    hf_config="Llama4TextConfig",
    tiny={
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 1,
        "intermediate_size": 32,
        "intermediate_size_mlp": 48,
        "max_position_embeddings": 64,
        "attention_chunk_size": 8,
        "rope_parameters": _SCOUT_ROPE,
    },
    variants={
        "scout": {},
        "maverick": {
            "interleave_moe_layer_step": 2,
            "use_qk_norm": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
        },
        "one_chunk": {  # wider than any sequence here
            "attention_chunk_size": 64,
            "num_experts_per_tok": 3,
            "rms_norm_eps": 1e-3,
            "num_key_value_heads": 4,
            "head_dim": 24,
        },
        "temperature": {"floor_scale": 3, "attn_scale": 0.7},
        "no_temperature": {"floor_scale": 3, "attn_scale": 0.7, "attn_temperature_tuning": False},
        "layers_by_hand": {
            "moe_layers": [1, 2],
            "no_rope_layers": [0, 1, 1, 0],
            "layer_types": [
                "chunked_attention", "full_attention", "chunked_attention", "full_attention",
            ],
            "attention_chunk_size": 3,
            "num_experts_per_tok": 2,
        },
        "tied_bias_yarn": {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "no_rope_layers": [1, 1, 1, 1],  # elsewhere a key's bias gets no gradient but noise
            "rope_parameters": _YARN,
        },
    },
    mutations={
        **EVERYWHERE,
        "rope everywhere": _rope_everywhere,
        "rope in halves": on_layers(_halves),
        "no chunks": on_layers(lambda layer: setattr(layer.attn, "chunk", None)),
        "chunks everywhere": on_layers(lambda layer: setattr(layer.attn, "chunk", 8)),
        "no norms of q and k": on_layers(
            lambda layer: layer.attn._modules.update(q_norm=None, k_norm=None)
        ),
        "norms everywhere": _norms_everywhere,
        "norms before rope": (
            "tied_bias_yarn",
            on_layers(lambda layer: setattr(layer.attn, "norm_after_rope", False)),
        ),
        "outputs weighted": on_moe(lambda mlp: setattr(mlp, "score_position", "after")),
        "softmax": on_moe(lambda mlp: setattr(mlp.router, "score_function", "softmax")),
        "no shared experts": no_shared_experts,
        "no temperature": (
            "temperature", on_layers(lambda layer: setattr(layer.attn, "query_scale", None)),
        ),
        "temperature everywhere": (
            "temperature",
            on_layers(
                lambda layer: setattr(
                    layer.attn, "query_scale", PositionTemperature(floor=3, strength=0.7)
                )
            ),
        ),
    },
    inert={
        "interleave_moe_layer_step": "of files without moe_layers",
        "no_rope_layer_interval": "of files without no_rope_layers",
    },
    skips={
        "left_padding": {"temperature": _ROWS},
        "gaps": {
            name: _ROWS
            for name in ("scout", "maverick", "temperature", "no_temperature", "layers_by_hand",
                         "tied_bias_yarn")
        },
    },
    bf16_limit=1.5,
    wide={
        "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 128,
        "num_experts_per_tok": 2,
    },
)  # fmt: skip
