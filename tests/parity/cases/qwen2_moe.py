"""Qwen2-MoE: a gated shared expert, biases on q, k and v alone, windows in some layers."""

from helpers_parity import EVERYWHERE, Case, no_shared_experts, on_layers, on_moe

from moe_builders.families import qwen2_moe


def _zero_biases(layer) -> None:
    for projection in (layer.attn.q_proj, layer.attn.k_proj, layer.attn.v_proj):
        projection.bias.data.zero_()


def _windows_of_the_other_layers(model) -> None:
    for layer in model.layers:
        layer.attn.window = 6 if layer.attn.window is None else None


def _one_more(layer) -> None:
    if layer.attn.window is not None:
        layer.attn.window += 1


CASE = Case(
    model_type="qwen2_moe",
    hf_model="Qwen2MoeForCausalLM",
    hf_config="Qwen2MoeConfig",
    tiny={
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 40,
        "intermediate_size": 48,
        "norm_topk_prob": False,
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
        # layers 0 and 2 of 5: every second one below max_window_layers
        "windows": {
            "num_hidden_layers": 5, "use_sliding_window": True, "sliding_window": 6,
            "max_window_layers": 4, "num_key_value_heads": 2,
        },
        "windows_by_layer": {
            "use_sliding_window": True, "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
        "tied": {"tie_word_embeddings": True},
        "no_bias": {"qkv_bias": False, "num_key_value_heads": 1},
        "normalised": {"norm_topk_prob": True},
        "yarn": {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    },
    mutations={
        **{name: ("gqa", mutate) for name, mutate in EVERYWHERE.items()},
        "no shared expert": no_shared_experts,
        "shared expert without a gate": on_moe(lambda mlp: setattr(mlp, "shared_gate", None)),
        "no biases": on_layers(_zero_biases),
        "no windows": ("windows", on_layers(lambda layer: setattr(layer.attn, "window", None))),
        "windows one wider": ("windows", on_layers(_one_more)),
        "windows of the other layers": ("windows", _windows_of_the_other_layers),
    },
    inert={
        "layer_types": "full attention in all layers, as windows are off",
        "max_window_layers": "of windows, which are off or given by layer_types",
        "sliding_window": "of windows, which are off",
    },
    own_defaults={"intermediate_size": "none: a model without dense layers needs none"},
    wide={
        "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 4, "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 192,
    },
)  # fmt: skip

RELEASES = [
    ("Qwen1.5-MoE-A2.7B-Chat", qwen2_moe.qwen1_5_moe_a2_7b, 14_315_784_192, "2.69"),
    ("Qwen2-57B-A14B", qwen2_moe.qwen2_moe_57b_a14b, 57_408_658_944, "14.25"),
]
