"""HunYuan-MoE v1: q/k norms after the rotary step, a rotary base stretched by alpha."""

from helpers_parity import EVERYWHERE, Case, no_shared_experts, on_layers, on_moe

from moe_builders.families.hunyuan_v1_moe import hunyuan_a13b

CASE = Case(
    model_type="hunyuan_v1_moe",
    hf_model="HunYuanMoEV1ForCausalLM",
    hf_config="HunYuanMoEV1Config",
    tiny={
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "num_experts": 8,
        "moe_topk": 3,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-4,
        "rope_parameters": {
            "rope_type": "dynamic", "rope_theta": 100.0, "alpha": 50.0, "factor": 1.0,
        },
    },
    variants={
        "plain": {},
        "gqa": {"num_key_value_heads": 2, "head_dim": 24, "rms_norm_eps": 1e-2},
        "tied": {"tie_word_embeddings": True, "num_key_value_heads": 2},
        "bias": {"attention_bias": True, "num_key_value_heads": 1},
        "topk_by_layer": {"moe_topk": [4, 2, 3]},
        "no_scaling": {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
    },
    mutations={
        **{name: ("gqa", mutate) for name, mutate in EVERYWHERE.items()},
        "norms before rope": (
            "gqa", on_layers(lambda layer: setattr(layer.attn, "norm_after_rope", False))
        ),
        "no q_norm": ("gqa", on_layers(lambda layer: setattr(layer.attn, "q_norm", None))),
        "no k_norm": ("gqa", on_layers(lambda layer: setattr(layer.attn, "k_norm", None))),
        "no alpha": on_layers(
            lambda layer: (
                layer.attn.rope.rule.update(alpha=1.0), layer.attn.rope.rope_init()
            )
        ),
        "no shared experts": no_shared_experts,
        "one more expert a token": (
            "topk_by_layer",
            on_moe(lambda mlp: setattr(mlp.router, "experts_per_token", 4)),
        ),
        "no attention bias": ("bias", on_layers(lambda layer: layer.attn.k_proj.bias.data.zero_())),
    },
    inert={
        "eod_token_id": "of the tokenizer",
        "sep_token_id": "of the tokenizer",
        "pretraining_tp": "of the pretraining's processes",
    },
    wide={
        "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 128,
    },
)  # fmt: skip
RELEASES = [("Hunyuan-A13B", hunyuan_a13b, 80_393_183_232, "12.75")]
