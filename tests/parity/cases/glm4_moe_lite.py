"""GLM-4.7-Flash: sigmoid router with a bias, latent attention, dense layers among the others."""

from helpers_parity import (
    EVERYWHERE,
    Case,
    no_correction_bias,
    no_shared_experts,
    on_layers,
    on_moe,
)

from moe_builders.families import glm4_moe_lite

YARN = {
    "rope_type": "yarn", "rope_theta": 1000.0, "factor": 8.0, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16,
}  # fmt: skip

CASE = Case(
    model_type="glm4_moe_lite",
    hf_model="Glm4MoeLiteForCausalLM",
    hf_config="Glm4MoeLiteConfig",
    tiny={
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 20,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "intermediate_size": 48,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "routed_scaling_factor": 1.8,
        "norm_topk_prob": True,
        "n_group": 4,
        "topk_group": 2,
        "rms_norm_eps": 1e-4,  # not the latents'
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    },
    variants={
        # one group and wide values, as the release
        "flash": {
            "n_group": 1, "topk_group": 1, "v_head_dim": 24, "num_attention_heads": 5,
            "num_key_value_heads": 5,
        },
        "groups": {"mlp_layer_types": None},
        "dense_interleaved": {
            "num_hidden_layers": 4, "mlp_layer_types": ["sparse", "dense", "sparse", "dense"],
            "tie_word_embeddings": True,
        },
        "all_experts": {
            "mlp_layer_types": ["sparse"] * 3, "n_shared_experts": 2, "norm_topk_prob": False,
        },
        "direct_queries": {"q_lora_rank": None, "rms_norm_eps": 1e-3},
        "bias": {"attention_bias": True},
        "half_rotated": {"rope_interleave": False},
        "yarn": {"rope_parameters": YARN},
    },
    mutations={
        **EVERYWHERE,
        "no correction bias": no_correction_bias,
        "no shared experts": no_shared_experts,
        "softmax": on_moe(lambda mlp: setattr(mlp.router, "score_function", "softmax")),
        "no groups": ("groups", on_moe(lambda mlp: setattr(mlp.router, "num_groups", 1))),
        "best of a group": (
            "groups", on_moe(lambda mlp: setattr(mlp.router, "group_score_topk", 1)),
        ),
        "no route scale": on_moe(lambda mlp: setattr(mlp.router, "route_scale", 1.0)),
        "rope half-rotated": on_layers(
            lambda layer: setattr(layer.attn.rope, "interleaved", False)
        ),
        "no mscale": ("yarn", on_layers(lambda layer: setattr(layer.attn, "scale", 20**-0.5))),
        "no norm of the latent": on_layers(
            lambda layer: layer.attn.kv_a_norm.weight.data.fill_(1)
        ),
        "no norm of the queries' latent": on_layers(
            lambda layer: layer.attn.q_a_norm.weight.data.fill_(1)
        ),
        "no biases": (
            "bias", on_layers(lambda layer: layer.attn.output_proj.bias.data.zero_()),
        ),
    },
    inert={
        "pretraining_tp": "nothing reads it",
        "num_nextn_predict_layers": "layers that pass through to an export",
        "num_mtp_layers": "transformers' other name of it",
    },
    own_defaults={
        "num_key_value_heads": "as many as heads: transformers' 20 serves no other number of them",
    },
    extra_tensors={  # what predicts the token after the next: as layer 47 of GLM-4.7-Flash
        "model.layers.3.eh_proj.weight": (64, 128),
        "model.layers.3.embed_tokens.weight": (128, 64),
        "model.layers.3.mlp.experts.0.up_proj.weight": (32, 64),
        "model.layers.3.mlp.gate.e_score_correction_bias": (8,),
        "model.layers.3.shared_head.norm.weight": (64,),
    },
    wide={
        "hidden_size": 256, "num_hidden_layers": 6, "mlp_layer_types": None,
        "num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 96, "kv_lora_rank": 64,
        "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
        "moe_intermediate_size": 128,
    },
)  # fmt: skip

RELEASES = [("GLM-4.7-Flash", glm4_moe_lite.glm4_7_flash, 29_943_390_976, "3.90")]
