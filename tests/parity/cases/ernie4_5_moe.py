"""ERNIE 4.5 MoE: a selection bias, interleaved rotary pairs, three rules for dense layers."""

from helpers_parity import (
    EVERYWHERE,
    Case,
    no_correction_bias,
    no_shared_experts,
    on_layers,
    on_moe,
)

from moe_builders.families.ernie4_5_moe import ernie4_5_moe_21b_a3b


def _no_bias(layer) -> None:
    mlp = layer.mlp.shared_experts if hasattr(layer.mlp, "experts") else layer.mlp
    mlp.w2.bias.data.zero_()


CASE = Case(
    model_type="ernie4_5_moe",
    hf_model="Ernie4_5_MoeForCausalLM",
    hf_config="Ernie4_5_MoeConfig",
    tiny={
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "moe_num_experts": 8,
        "moe_k": 3,
        "moe_intermediate_size": 32,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    },
    variants={
        "plain": {},
        "tied": {"tie_word_embeddings": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-2},
        "head_dim_yarn": {
            "head_dim": 24, "num_key_value_heads": 1,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
        "all_moe": {"moe_layer_start_index": 0, "moe_num_shared_experts": 0},
        "interleaved": {
            "num_hidden_layers": 4, "moe_layer_start_index": 0, "moe_layer_interval": 2,
        },
        "ends_before_the_last": {
            "num_hidden_layers": 4, "moe_layer_start_index": 1, "moe_layer_end_index": 2,
            "moe_num_shared_experts": 1,
        },
        "bias": {"use_bias": True},
        # so many that some tokens' weights are divided by it and some by their sum
        "norm_min": {"moe_norm_min": 0.9},
    },
    mutations={
        **EVERYWHERE,
        "no correction bias": no_correction_bias,
        "no shared experts": no_shared_experts,
        "rotary pairs half a head apart": on_layers(
            lambda layer: setattr(layer.attn.rope, "interleaved", False)
        ),
        "no smallest sum": (
            "norm_min", on_moe(lambda mlp: setattr(mlp.router, "normalize_min", 0.0))
        ),
        "no biases of attention": (
            "bias", on_layers(lambda layer: layer.attn.output_proj.bias.data.zero_())
        ),
        "no biases of dense layers and shared experts": ("bias", on_layers(_no_bias)),
    },
    extra_tensors={
        "model.mtp_emb_norm.0.weight": (64,),
        "model.mtp_linear_proj.0.weight": (64, 128),
        "model.mtp_block.0.self_attn.q_proj.weight": (64, 64),
    },
    wide={
        "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 4, "intermediate_size": 192, "moe_intermediate_size": 128,
    },
)  # fmt: skip
RELEASES = [("ERNIE-4.5-21B-A3B-PT", ernie4_5_moe_21b_a3b, 21_825_436_160, "3.35")]
