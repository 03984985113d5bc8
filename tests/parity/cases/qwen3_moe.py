"""Qwen3-MoE: softmax router, q/k norms before the rotary step, dense layers among the others."""

from helpers_parity import EVERYWHERE, Case, on_layers

from moe_builders.families import qwen3_moe


def _norm_after_rope(layer) -> None:
    attention = layer.attn
    norms = {4: attention.q_norm, 2: attention.k_norm}  # by heads
    attention.q_norm = attention.k_norm = None
    rope = attention.rope
    attention.rope = None
    del attention._modules["rope"]
    attention.rope = lambda x, positions: norms[x.shape[1]](rope(x, positions))


CASE = Case(
    model_type="qwen3_moe",
    hf_model="Qwen3MoeForCausalLM",
    hf_config="Qwen3MoeConfig",
    tiny={
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "intermediate_size": 48,
        "norm_topk_prob": True,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    },
    variants={
        "plain": {},
        # head_dim is not hidden / heads; an eps large enough to be seen
        "gqa": {"num_key_value_heads": 2, "head_dim": 24, "rms_norm_eps": 1e-3},
        "dense_first": {"mlp_only_layers": [0]},
        "dense_interleaved": {
            "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1],
        },
        "tied": {"tie_word_embeddings": True},
        "bias": {"attention_bias": True, "num_key_value_heads": 2},
        "unnormalised": {"norm_topk_prob": False},
        "yarn": {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    },
    mutations={
        **{name: ("gqa", mutate) for name, mutate in EVERYWHERE.items()},
        "no q_norm": ("gqa", on_layers(lambda layer: setattr(layer.attn, "q_norm", None))),
        "no k_norm": ("gqa", on_layers(lambda layer: setattr(layer.attn, "k_norm", None))),
        "norms after rope": ("gqa", on_layers(_norm_after_rope)),
    },
    inert={
        "max_window_layers": "of windows, which are off",
        "sliding_window": "of windows, which are off",
    },
    own_defaults={"intermediate_size": "none: a model without dense layers needs none"},
    bf16_limit=1.5,
    wide={
        "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64, "moe_intermediate_size": 128,
    },
)  # fmt: skip

RELEASES = [
    ("Qwen3-30B-A3B", qwen3_moe.qwen3_moe_30b_a3b, 30_532_122_624, "3.35"),
    ("Qwen3-235B-A22B", qwen3_moe.qwen3_moe_235b_a22b, 235_093_634_560, "22.19"),
    (
        "Qwen3-Coder-480B-A35B-Instruct",
        qwen3_moe.qwen3_coder_480b_a35b,
        480_154_875_392,
        "35.47",
    ),
]
