"""GLM-4-MoE: sigmoid router with a bias, shared experts, half of each head turned, q/k/v biases."""

from helpers_parity import (
    EVERYWHERE,
    Case,
    no_correction_bias,
    no_shared_experts,
    on_layers,
    on_moe,
)

from moe_builders.attention.rope import RotaryEmbedding
from moe_builders.families import glm4_moe


def _zero_biases(layer) -> None:
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(layer.attn, name).bias.data.zero_()


def _rope_of(**arguments):
    def change(layer) -> None:
        layer.attn.rope = RotaryEmbedding(head_dim=layer.attn.head_dim, base=1000.0, **arguments)

    return on_layers(change)


CASE = Case(
    model_type="glm4_moe",
    hf_model="Glm4MoeForCausalLM",
    hf_config="Glm4MoeConfig",
    tiny={
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,  # which 64 is no multiple of, as with the releases
        "num_key_value_heads": 2,
        "head_dim": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "intermediate_size": 48,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
        "norm_topk_prob": True,
        "attention_bias": True,
        "use_qk_norm": False,
        "max_position_embeddings": 64,
        "num_nextn_predict_layers": 1,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5,
        },
    },
    variants={
        "air": {},
        # the 355B models; an eps large enough to be seen
        "qk_norm": {"use_qk_norm": True, "rms_norm_eps": 1e-3, "head_dim": 24},
        "dense_first": {"first_k_dense_replace": 2, "num_attention_heads": 2},
        "all_experts": {"first_k_dense_replace": 0, "n_shared_experts": 2},
        "groups": {"n_group": 4, "topk_group": 2, "num_key_value_heads": 6},
        "unnormalised": {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
        "no_bias": {"attention_bias": False},
        "tied": {"tie_word_embeddings": True},
        "quarter_turned": {
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.25,
            },
        },
        "yarn": {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1000.0, "partial_rotary_factor": 0.5,
                "factor": 4.0, "original_max_position_embeddings": 16,
            },
        },
    },
    mutations={
        **EVERYWHERE,
        "no correction bias": no_correction_bias,
        "no shared experts": no_shared_experts,
        "no biases": on_layers(_zero_biases),
        "whole heads turned": _rope_of(),
        "no scale": on_moe(lambda mlp: setattr(mlp.router, "route_scale", 1.0)),
        "softmax": on_moe(lambda mlp: setattr(mlp.router, "score_function", "softmax")),
        "no groups": ("groups", on_moe(lambda mlp: setattr(mlp.router, "num_groups", 1))),
        "no q_norm": ("qk_norm", on_layers(lambda layer: setattr(layer.attn, "q_norm", None))),
        "no k_norm": ("qk_norm", on_layers(lambda layer: setattr(layer.attn, "k_norm", None))),
        "norms after rope": (
            "qk_norm", on_layers(lambda layer: setattr(layer.attn, "norm_after_rope", True)),
        ),
        "no yarn": ("yarn", _rope_of(fraction=0.5)),
    },
    inert={"num_nextn_predict_layers": "layers that pass through to an export"},
    extra_tensors={  # what predicts the token after next: as layer 46 of GLM-4.5-Air
        "model.layers.3.eh_proj.weight": (64, 128),
        "model.layers.3.mlp.experts.0.up_proj.weight": (32, 64),
        "model.layers.3.mlp.gate.e_score_correction_bias": (8,),
        "model.layers.3.shared_head.norm.weight": (64,),
    },
    wide={
        "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 12,
        "num_key_value_heads": 4, "head_dim": 64, "moe_intermediate_size": 128,
    },
)  # fmt: skip

RELEASES = [
    ("GLM-4.5-Air", glm4_moe.glm4_5_air, 106_852_245_504, "13.42"),
    ("GLM-4.5", glm4_moe.glm4_5, 352_797_814_784, "33.63"),
]
