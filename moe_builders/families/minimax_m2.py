"""MiniMax-M2, M2.5, M2.7 (minimax_m2): facts, builders, config reader, weight rows.

Source: transformers ``models/minimax_m2`` (5.23); field names of config.json in brackets below.
Sigmoid per expert plus a selection-only bias, top-k, weights always renormalised by their bare sum
(nothing is added to it); SwiGLU experts without biases in every layer, no shared experts;
grouped-query attention without biases, an RMSNorm over the full width of q and of k before heads
are parted; the first rotary_dim dims of each head are turned, rotary layout half-rotated; all norms
pre-norm. Layers that predict further tokens stand after the last one on disk and pass through to an
export. Checkpoints have Mixtral's names.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from moe_builders import hf_rows
from moe_builders.attention.gqa import GroupedQueryAttention
from moe_builders.attention.rope import RotaryEmbedding
from moe_builders.config_reader import ConfigReader
from moe_builders.decoder import MoEDecoder, moe_decoder
from moe_builders.family import Family
from moe_builders.moe import moe_layer

MODEL_TYPE = "minimax_m2"

WEIGHT_MAP = (
    *hf_rows.EMBEDDINGS,
    *hf_rows.PRE_NORMS,
    *hf_rows.ATTENTION,
    *hf_rows.QK_NORMS,
    *hf_rows.MIXTRAL_EXPERTS,
    *hf_rows.FURTHER_LAYERS,
)


def minimax_m2(
    *,
    vocab_size: int,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_experts: int,
    experts_per_token: int,
    expert_hidden_dim: int,
    max_seq_len: int,
    rope_base: float = 5_000_000.0,
    rope_scaling: Mapping[str, Any] | None = None,
    rope_fraction: float = 0.5,
    norm_eps: float = 1e-6,
    tie_word_embeddings: bool = False,
) -> MoEDecoder:
    """A MiniMax-M2 decoder from plain numbers.

    Args:
        vocab_size: [vocab_size].
        embed_dim: [hidden_size].
        num_layers: [num_hidden_layers].
        num_heads: [num_attention_heads].
        num_kv_heads: [num_key_value_heads].
        head_dim: [head_dim]; not embed_dim / num_heads in the releases.
        num_experts: [num_local_experts].
        experts_per_token: [num_experts_per_tok].
        expert_hidden_dim: [intermediate_size], of one expert.
        max_seq_len: [max_position_embeddings].
        rope_base: [rope_theta].
        rope_scaling: [rope_scaling, rope_parameters], see ``RotaryEmbedding``.
        rope_fraction: [rotary_dim / head_dim, or partial_rotary_factor].
        norm_eps: [rms_norm_eps].
        tie_word_embeddings: [tie_word_embeddings].

    Raises:
        InputError: a number out of its range.
    """
    rope = RotaryEmbedding(
        head_dim=head_dim,
        base=rope_base,
        scaling=rope_scaling,
        fraction=rope_fraction,
        max_seq_len=max_seq_len,
    )

    def attention(layer: int) -> nn.Module:
        return GroupedQueryAttention(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=rope,
            q_norm=nn.RMSNorm(num_heads * head_dim, eps=norm_eps),
            k_norm=nn.RMSNorm(num_kv_heads * head_dim, eps=norm_eps),
            norm_width="full",
        )

    def mlp(layer: int) -> nn.Module:
        return moe_layer(
            embed_dim=embed_dim,
            expert_hidden_dim=expert_hidden_dim,
            num_experts=num_experts,
            experts_per_token=experts_per_token,
            score_function="sigmoid",
            normalize_eps=0.0,
            expert_bias=True,
        )

    return moe_decoder(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        head_dim=head_dim,
        max_seq_len=max_seq_len,
        attention=attention,
        mlp=mlp,
        norm_eps=norm_eps,
        tie_word_embeddings=tie_word_embeddings,
    )


def minimax_m2_230b_a10b() -> MoEDecoder:
    """MiniMax-M2 and M2.5: 228,689,748,992 parameters, 11.03 B active.

    Source: config.json of M2.5 (ai-dynamo/aiconfigurator), with which transformers' defaults of
    ``MiniMaxM2Config`` agree but for rotary_dim; MiniMax-AI/MiniMax-M2 README for the counts.
    """
    return minimax_m2(
        vocab_size=200064,
        embed_dim=3072,
        num_layers=62,
        num_heads=48,
        num_kv_heads=8,
        head_dim=128,
        num_experts=256,
        experts_per_token=8,
        expert_hidden_dim=1536,
        max_seq_len=196608,
    )


def builder_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of this model type -> arguments of ``minimax_m2``.

    Raises:
        InputError: fields this family does not honour, or needed ones that are missing; all of
            them are named.
    """
    read = ConfigReader(config, MODEL_TYPE)
    head_dim = read.whole("head_dim", default=128)
    turned = read.whole("rotary_dim", default=head_dim)
    layers = read.whole("num_hidden_layers")
    arguments = {
        "vocab_size": read.whole("vocab_size"),
        "embed_dim": read.whole("hidden_size"),
        "num_layers": layers,
        "num_heads": read.whole("num_attention_heads"),
        "num_kv_heads": read.whole("num_key_value_heads"),
        "head_dim": head_dim,
        "num_experts": read.whole("num_local_experts", "num_experts"),
        "experts_per_token": read.top_k("num_experts_per_tok", normalised=True),
        "expert_hidden_dim": read.whole("intermediate_size"),
        "max_seq_len": read.whole("max_position_embeddings"),
        **read.rope(default_base=5_000_000.0, default_fraction=turned / head_dim),
        "norm_eps": read.number("rms_norm_eps", default=1e-6),
        "tie_word_embeddings": read.flag("tie_word_embeddings", default=False),
    }
    read.only("hidden_act", "silu")
    read.only("attention_bias", False)
    read.only("attention_dropout", 0)
    read.only("router_jitter_noise", 0)  # of the layer's input, in training
    read.only("scoring_func", "sigmoid")
    read.only("use_routing_bias", True)
    read.only("use_qk_norm", True)
    read.only("qk_norm_type", "per_layer")
    read.only("attn_type_list", [1] * layers)  # full attention everywhere
    read.only("sliding_window", None)
    read.only("shared_intermediate_size", 0)
    for branch in ("full_attention", "linear_attention", "mlp"):
        read.only(f"layernorm_{branch}_beta", 1)
    # of dense layers and shared experts, which there are none of; of layers that pass through
    read.ignore("mlp_intermediate_size", "shared_moe_mode")
    read.ignore("use_mtp", "num_mtp_modules", "mtp_transformer_layers")
    read.finish()
    return arguments


FAMILY = Family(MODEL_TYPE, WEIGHT_MAP, builder_arguments, minimax_m2)
