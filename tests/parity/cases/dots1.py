"""dots.llm1: sigmoid router with a bias, shared experts, q/k norms, windows in later layers."""

from helpers_parity import (
    EVERYWHERE,
    Case,
    no_correction_bias,
    no_shared_experts,
    on_layers,
    on_moe,
)

from moe_builders.families import dots1


def _output_bias_off(layer) -> None:
    layer.attn.output_proj.bias.data.zero_()


CASE = Case(
    model_type="dots1",
    hf_model="Dots1ForCausalLM",
    hf_config="Dots1Config",
    tiny={
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "n_shared_experts": 2,
        "intermediate_size": 48,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "sliding_window": None,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    },
    variants={
        "plain": {},
        # head_dim is not hidden / heads; an eps large enough to be seen
        "gqa": {"num_key_value_heads": 2, "head_dim": 24, "rms_norm_eps": 1e-3},
        "all_experts": {"first_k_dense_replace": 0, "n_shared_experts": 1},
        "windows": {"sliding_window": 6, "max_window_layers": 1},
        "layer_types": {
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        "groups": {"n_group": 4, "topk_group": 2},
        "unnormalised": {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
        "bias": {"attention_bias": True, "num_key_value_heads": 2},
        "tied": {"tie_word_embeddings": True},
        "linear_rope": {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0},
        },
    },
    mutations={
        **EVERYWHERE,
        "no correction bias": no_correction_bias,
        "no shared experts": no_shared_experts,
        "no scale": on_moe(lambda mlp: setattr(mlp.router, "route_scale", 1.0)),
        "softmax": on_moe(lambda mlp: setattr(mlp.router, "score_function", "softmax")),
        "no groups": ("groups", on_moe(lambda mlp: setattr(mlp.router, "num_groups", 1))),
        "no q_norm": on_layers(lambda layer: setattr(layer.attn, "q_norm", None)),
        "no k_norm": on_layers(lambda layer: setattr(layer.attn, "k_norm", None)),
        "norms after rope": on_layers(lambda layer: setattr(layer.attn, "norm_after_rope", True)),
        "no output bias": ("bias", on_layers(_output_bias_off)),
        "no window": ("windows", on_layers(lambda layer: setattr(layer.attn, "window", None))),
        "windows everywhere": (
            "layer_types", on_layers(lambda layer: setattr(layer.attn, "window", 5)),
        ),
    },
    inert={"max_window_layers": "says what layer_types are, which save_pretrained writes"},
    wide={
        "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 4, "moe_intermediate_size": 128,
    },
)  # fmt: skip

RELEASES = [("dots.llm1.inst", dots1.dots_llm1, 142_774_373_888, "14.02")]
