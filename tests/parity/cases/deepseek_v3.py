"""DeepSeek-V3: sigmoid router with a bias and groups, latent attention, YaRN with mscale."""

from helpers_parity import (
    EVERYWHERE,
    Case,
    no_correction_bias,
    no_shared_experts,
    on_layers,
    on_moe,
)

from moe_builders.families import deepseek_v3

YARN = {
    "rope_type": "yarn", "rope_theta": 1000.0, "factor": 8.0, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16,
}  # fmt: skip

CASE = Case(
    model_type="deepseek_v3",
    hf_model="DeepseekV3ForCausalLM",
    hf_config="DeepseekV3Config",
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
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.0,
        "norm_topk_prob": True,
        "n_group": 4,
        "topk_group": 2,
        "rms_norm_eps": 1e-4,  # not the latents'
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    },
    variants={
        "groups": {},
        "yarn": {"rope_parameters": YARN, "rms_norm_eps": 1e-3},
        # as Moonlight: queries without a latent, one group, more shared experts
        "moonlight": {
            "q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2,
        },
        # as Kimi-K2: all pairs of dims are stretched or none
        "kimi_k2": {
            "n_group": 1, "topk_group": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
            "rope_parameters": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0},
        },
        "all_experts": {"first_k_dense_replace": 0, "norm_topk_prob": False},
        "bias": {"attention_bias": True, "v_head_dim": 24, "first_k_dense_replace": 2},
        "half_rotated": {"rope_interleave": False},
        "tied": {"tie_word_embeddings": True},
    },
    mutations={
        **EVERYWHERE,
        "no correction bias": no_correction_bias,
        "no shared experts": no_shared_experts,
        "softmax": on_moe(lambda mlp: setattr(mlp.router, "score_function", "softmax")),
        "no groups": on_moe(lambda mlp: setattr(mlp.router, "num_groups", 1)),
        "best of a group": on_moe(lambda mlp: setattr(mlp.router, "group_score_topk", 1)),
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
        "num_key_value_heads": "as many as heads: transformers' 128 serves no other number of them",
    },
    extra_tensors={  # what predicts the token after the next: as layer 61 of DeepSeek-V3
        "model.layers.3.eh_proj.weight": (64, 128),
        "model.layers.3.embed_tokens.weight": (128, 64),
        "model.layers.3.mlp.experts.0.up_proj.weight": (32, 64),
        "model.layers.3.mlp.gate.e_score_correction_bias": (8,),
        "model.layers.3.shared_head.norm.weight": (64,),
        "model.layers.0.self_attn.rotary_emb.inv_freq": (4,),
    },
    wide={
        "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 8, "q_lora_rank": 96, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16, "v_head_dim": 32, "moe_intermediate_size": 128,
    },
)  # fmt: skip

RELEASES = [
    ("DeepSeek-V3", deepseek_v3.deepseek_v3_671b, 671_026_404_352, "37.55"),
    ("Moonlight-16B-A3B", deepseek_v3.moonlight_16b_a3b, 15_960_108_544, "2.91"),
    ("Kimi-K2-Instruct", deepseek_v3.kimi_k2, 1_026_408_209_408, "32.86"),
]
