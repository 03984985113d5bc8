"""DeepSeek-V2: softmax router with groups, shared experts, latent attention, YaRN with mscale."""

from helpers_parity import EVERYWHERE, Case, no_shared_experts, on_layers, on_moe

from moe_builders.families import deepseek_v2

YARN = {
    "rope_type": "yarn", "rope_theta": 1000.0, "factor": 8.0, "beta_fast": 32, "beta_slow": 1,
    "mscale": 0.707, "mscale_all_dim": 0.707, "original_max_position_embeddings": 16,
}  # fmt: skip


def _flatter_routers(model) -> None:
    """Halves what makes margins wide: in the tail of a sharp softmax they are narrow again."""
    for name, weight in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            weight.data.mul_(0.5)


def _best_two_of_a_group(mlp) -> None:
    mlp.router.group_score_topk = 2


CASE = Case(
    model_type="deepseek_v2",
    hf_model="DeepseekV2ForCausalLM",
    hf_config="DeepseekV2Config",
    tiny={
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 20,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "n_shared_experts": 2,
        "intermediate_size": 48,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.0,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "rms_norm_eps": 1e-4,  # not the latents'
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    },
    variants={
        "groups": {},
        # as V2-Lite: queries without a latent, all experts to choose from
        "lite": {
            "q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
            "routed_scaling_factor": 1.0, "rope_parameters": YARN,
        },
        "yarn": {"rope_parameters": YARN, "rms_norm_eps": 1e-3},
        "all_experts": {
            "first_k_dense_replace": 0, "n_shared_experts": 1, "topk_method": "greedy",
            "n_group": None, "topk_group": None,
        },
        "bias": {"attention_bias": True, "v_head_dim": 24, "first_k_dense_replace": 2},
        "tied": {"tie_word_embeddings": True},
    },
    mutations={
        **EVERYWHERE,
        "no shared experts": no_shared_experts,
        "no groups": on_moe(lambda mlp: setattr(mlp.router, "num_groups", 1)),
        "two best of a group": on_moe(_best_two_of_a_group),
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
            "bias", on_layers(lambda layer: layer.attn.kv_a_proj.bias.data.zero_()),
        ),
    },
    inert={"pretraining_tp": "nothing reads it"},
    prepare=_flatter_routers,
    wide={
        "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "q_lora_rank": 96,
        "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
        "moe_intermediate_size": 128,
    },
)  # fmt: skip

RELEASES = [
    ("DeepSeek-V2-Lite", deepseek_v2.deepseek_v2_lite, 15_706_484_224, "2.66"),
    ("DeepSeek-V2", deepseek_v2.deepseek_v2_236b, 235_741_434_880, "21.38"),
]
