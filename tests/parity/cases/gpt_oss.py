"""gpt-oss: top-k then softmax, biases everywhere, sinks, windows, clamped activation, YaRN."""

from helpers_parity import EVERYWHERE, Case, on_layers
from torch import nn

from moe_builders.families.gpt_oss import gpt_oss_20b, gpt_oss_120b
from moe_builders.ops.activations import find_activation

RELEASES = [
    ("gpt-oss-20b", gpt_oss_20b, 20_914_757_184, "4.19"),
    ("gpt-oss-120b", gpt_oss_120b, 116_829_156_672, "5.71"),
]
_YARN = {
    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "beta_fast": 8.0,
    "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 16,
}  # fmt: skip


def _zero(module: nn.Module, name: str) -> None:
    getattr(module, name).data.zero_()


CASE = Case(
    model_type="gpt_oss",
    hf_model="GptOssForCausalLM",
    hf_config="GptOssConfig",
    tiny={
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "sliding_window": 8,
        "swiglu_limit": 0.5,
        "rope_parameters": _YARN,
    },
    variants={
        "plain": {},
        "full_first": {
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "sliding_window": 3,
        },
        "tied_no_bias_mha": {
            "tie_word_embeddings": True,
            "attention_bias": False,
            "num_key_value_heads": 4,
            "head_dim": 16,
        },
        "other_constants": {
            "swiglu_limit": 7.0,
            "rms_norm_eps": 1e-3,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
        },
        "truncated_yarn": {"rope_parameters": _YARN | {"truncate": True}},
    },
    mutations={
        **{k: v for k, v in EVERYWHERE.items() if k != "normalisation of weights"},
        "no sinks": on_layers(lambda layer: setattr(layer.attn, "sinks", None)),
        "no window": on_layers(lambda layer: setattr(layer.attn, "window", None)),
        "no router bias": on_layers(lambda layer: _zero(layer.mlp.router.gate, "bias")),
        "no up bias": on_layers(lambda layer: _zero(layer.mlp.experts, "gate_up_bias")),
        "no down bias": on_layers(lambda layer: _zero(layer.mlp.experts, "down_bias")),
        "no output bias": on_layers(lambda layer: _zero(layer.attn.output_proj, "bias")),
        "plain swiglu": on_layers(
            lambda layer: setattr(layer.mlp.experts, "activation", find_activation("swiglu"))
        ),
    },
)
