"""Mixtral: softmax router, weights always normalised, a window in some releases."""

from helpers_parity import EVERYWHERE, Case, on_layers

from moe_builders.families import mixtral

CASE = Case(
    model_type="mixtral",
    hf_model="MixtralForCausalLM",
    hf_config="MixtralConfig",
    tiny={
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "sliding_window": None,
        "rms_norm_eps": 1e-4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    },
    variants={
        "plain": {},
        # head_dim is not hidden / heads; an eps large enough to be seen
        "head_dim": {"head_dim": 24, "rms_norm_eps": 1e-3},
        "all_heads": {"num_key_value_heads": 4},
        "window": {"sliding_window": 6},
        "tied": {"tie_word_embeddings": True},
    },
    mutations={
        **EVERYWHERE,
        "no window": ("window", on_layers(lambda layer: setattr(layer.attn, "window", None))),
        "window of one more": ("window", on_layers(lambda layer: setattr(layer.attn, "window", 7))),
    },
    wide={
        "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 128,
    },
)  # fmt: skip

RELEASES = [
    ("Mixtral-8x7B-v0.1", mixtral.mixtral_8x7b, 46_702_792_704, "12.88"),
    ("Mixtral-8x22B-v0.1", mixtral.mixtral_8x22b, 140_620_634_112, "39.15"),
]
