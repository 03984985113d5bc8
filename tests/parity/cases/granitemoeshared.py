"""Granite-MoE with shared experts, whose gate and up are one tensor on disk."""

from helpers_parity import EVERYWHERE, Case, no_shared_experts, on_moe


def _swap_shared(mlp) -> None:
    shared = mlp.shared_experts
    shared.w1, shared.w3 = shared.w3, shared.w1


CASE = Case(
    model_type="granitemoeshared",
    hf_model="GraniteMoeSharedForCausalLM",
    hf_config="GraniteMoeSharedConfig",
    tiny={
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "intermediate_size": 32,
        "shared_intermediate_size": 40,
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
        "no_shared": {"shared_intermediate_size": 0},
        "tied": {"tie_word_embeddings": True, "num_key_value_heads": 4},
        "bias": {"attention_bias": True, "head_dim": 24},
    },
    mutations={
        **{name: mutate for name, mutate in EVERYWHERE.items() if not name.startswith("normal")},
        "no shared experts": no_shared_experts,
        "shared gate and up swapped": on_moe(_swap_shared),
    },
    wide={
        "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 4, "intermediate_size": 128, "shared_intermediate_size": 160,
        "attention_multiplier": 0.2,
    },
)  # fmt: skip
