"""MiniMax-M2: sigmoid router with a bias, full-width q/k norms, a part of each head turned."""

from helpers_parity import EVERYWHERE, Case, no_correction_bias, on_layers, on_moe
from torch import nn

from moe_builders.attention.rope import RotaryEmbedding
from moe_builders.families import minimax_m2


def _norms_by_head(layer) -> None:
    attention = layer.attn
    attention.norm_width = "head"
    for name in ("q_norm", "k_norm"):
        full = getattr(attention, name)
        by_head = nn.RMSNorm(attention.head_dim, eps=full.eps)
        by_head.weight.data = full.weight.data[: attention.head_dim]
        setattr(attention, name, by_head)


def _whole_heads_turned(layer) -> None:
    layer.attn.rope = RotaryEmbedding(head_dim=layer.attn.head_dim, base=1000.0)


CASE = Case(
    model_type="minimax_m2",
    hf_model="MiniMaxM2ForCausalLM",
    hf_config="MiniMaxM2Config",
    tiny={
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "rotary_dim": 12,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    },
    variants={
        "half_turned": {},
        "quarter_turned": {"head_dim": 16, "rotary_dim": 4, "num_key_value_heads": 4},
        # an eps large enough to be seen
        "whole_turned": {"head_dim": 16, "rotary_dim": 16, "rms_norm_eps": 1e-2},
        "one_kv_head": {"num_attention_heads": 6, "num_key_value_heads": 1},
        "tied": {"tie_word_embeddings": True},
        "yarn": {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    },
    mutations={
        **EVERYWHERE,
        "no correction bias": no_correction_bias,
        "softmax": on_moe(lambda mlp: setattr(mlp.router, "score_function", "softmax")),
        "whole heads turned": on_layers(_whole_heads_turned),
        "norms by head": on_layers(_norms_by_head),
        "no q_norm": on_layers(lambda layer: setattr(layer.attn, "q_norm", None)),
        "no k_norm": on_layers(lambda layer: setattr(layer.attn, "k_norm", None)),
    },
    inert={"rotary_dim": "save_pretrained writes partial_rotary_factor, which goes first"},
    extra_tensors={  # what predicts the token after next
        "model.layers.3.eh_proj.weight": (64, 128),
        "model.layers.3.block_sparse_moe.experts.0.w1.weight": (32, 64),
        "model.layers.3.block_sparse_moe.e_score_correction_bias": (8,),
    },
    wide={
        "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64, "rotary_dim": 32, "intermediate_size": 128,
    },
)  # fmt: skip

RELEASES = [("MiniMax-M2", minimax_m2.minimax_m2_230b_a10b, 228_689_748_992, "11.03")]
