"""Granite-MoE: softmax over the chosen logits, multipliers everywhere, fused expert tensors."""

from helpers_parity import EVERYWHERE, Case, on_layers, on_moe


def _set(name, value):
    return lambda module: setattr(module, name, value)


CASE = Case(
    model_type="granitemoe",
    hf_model="GraniteMoeForCausalLM",
    hf_config="GraniteMoeConfig",
    tiny={
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.6,
        "residual_multiplier": 0.7,
        "logits_scaling": 1.5,
        "rms_norm_eps": 1e-4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    },
    variants={
        "plain": {},
        "gqa": {"num_key_value_heads": 2, "rms_norm_eps": 1e-2},
        "head_dim_yarn": {
            "head_dim": 24, "num_key_value_heads": 1,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
        "tied": {"tie_word_embeddings": True, "num_key_value_heads": 2},
        "bias": {"attention_bias": True, "num_key_value_heads": 2},
        "defaults": {  # every multiplier 1, that of q·k too
            "embedding_multiplier": 1.0, "attention_multiplier": 1.0, "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
    },
    mutations={
        # weights are the softmax over the chosen logits: there is no sum to divide by
        **{name: ("gqa", m) for name, m in EVERYWHERE.items() if not name.startswith("normal")},
        "softmax over all experts": on_moe(
            lambda mlp: (
                setattr(mlp.router, "score_function", "softmax"),
                setattr(mlp.router, "normalize_weights", False),
            )
        ),
        "no embedding multiplier": _set("embedding_scale", 1.0),
        "no logits scaling": _set("logits_scale", 1.0),
        "logits multiplied": _set("logits_scale", 1.5),
        "no attention multiplier": on_layers(lambda layer: setattr(layer.attn, "scale", None)),
        "no multiplier where 1 is not the usual": (
            "defaults", on_layers(lambda layer: setattr(layer.attn, "scale", None))
        ),
        "no residual multiplier of attention": on_layers(
            lambda layer: setattr(layer.sa_scale, "factor", 1.0)
        ),
        "no residual multiplier of experts": on_layers(
            lambda layer: setattr(layer.mlp_scale, "factor", 1.0)
        ),
        "no attention bias": ("bias", on_layers(lambda layer: layer.attn.v_proj.bias.data.zero_())),
    },
    wide={
        "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 4, "intermediate_size": 128, "attention_multiplier": 0.2,
    },
)  # fmt: skip
