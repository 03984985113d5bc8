"""OLMoE: facts, builders, config reader, weight rows.

Source: transformers ``models/olmoe`` (5.23); field names of config.json in brackets below.
Softmax over all experts, top-k, weights not renormalised in the release [norm_topk_prob]; SwiGLU
experts without biases in every layer, no shared experts; attention with one RMSNorm over all heads
of q and one over all of k, before the rotary step; q, k and v may be clipped after that; rotary
layout half-rotated; all norms pre-norm.
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

MODEL_TYPE = "olmoe"

WEIGHT_MAP = (
    *hf_rows.EMBEDDINGS,
    *hf_rows.PRE_NORMS,
    *hf_rows.ATTENTION,
    *hf_rows.QK_NORMS,
    *hf_rows.ROUTER,
    *hf_rows.EXPERTS,
)


def olmoe(
    *,
    vocab_size: int,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    num_experts: int,
    experts_per_token: int,
    expert_hidden_dim: int,
    max_seq_len: int,
    num_kv_heads: int | None = None,
    rope_base: float = 10_000.0,
    rope_scaling: Mapping[str, Any] | None = None,
    norm_eps: float = 1e-5,
    normalize_weights: bool = False,
    attention_bias: bool = False,
    clip_qkv: float | None = None,
    tie_word_embeddings: bool = False,
) -> MoEDecoder:
    """An OLMoE decoder from plain numbers.

    Args:
        vocab_size: [vocab_size].
        embed_dim: [hidden_size].
        num_layers: [num_hidden_layers].
        num_heads: [num_attention_heads]; a head is embed_dim / num_heads wide.
        num_experts: [num_experts].
        experts_per_token: [num_experts_per_tok].
        expert_hidden_dim: [intermediate_size], of one expert.
        max_seq_len: [max_position_embeddings].
        num_kv_heads: [num_key_value_heads]; None: num_heads.
        rope_base: [rope_theta].
        rope_scaling: [rope_scaling, rope_parameters], see ``RotaryEmbedding``.
        norm_eps: [rms_norm_eps].
        normalize_weights: [norm_topk_prob].
        attention_bias: [attention_bias], of all four projections.
        clip_qkv: [clip_qkv].
        tie_word_embeddings: [tie_word_embeddings].

    Raises:
        InputError: a number out of its range.
    """
    num_kv_heads, head_dim = num_kv_heads or num_heads, embed_dim // num_heads
    rope = RotaryEmbedding(
        head_dim=head_dim,
        base=rope_base,
        scaling=rope_scaling,
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
            bias=attention_bias,
            clip_qkv=clip_qkv,
        )

    def mlp(layer: int) -> nn.Module:
        return moe_layer(
            embed_dim=embed_dim,
            expert_hidden_dim=expert_hidden_dim,
            num_experts=num_experts,
            experts_per_token=experts_per_token,
            normalize_weights=normalize_weights,
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


def olmoe_1b_7b() -> MoEDecoder:
    """OLMoE-1B-7B-0924: 6,919,161,856 parameters, 1.28 B active.

    Source: configs/OLMoE-1B-7B-0924.yml of allenai/OLMoE.
    """
    return olmoe(
        vocab_size=50304,
        embed_dim=2048,
        num_layers=16,
        num_heads=16,
        num_experts=64,
        experts_per_token=8,
        expert_hidden_dim=1024,
        max_seq_len=4096,
    )


def builder_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of this model type -> arguments of ``olmoe``.

    Raises:
        InputError: fields this family does not honour, or needed ones that are missing; all of
            them are named.
    """
    read = ConfigReader(config, MODEL_TYPE)
    dim, heads = read.whole("hidden_size"), read.whole("num_attention_heads")
    normalised = read.flag("norm_topk_prob", default=False)
    arguments = {
        "vocab_size": read.whole("vocab_size"),
        "embed_dim": dim,
        "num_layers": read.whole("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": read.whole("num_key_value_heads", default=heads),
        "num_experts": read.whole("num_experts", "num_local_experts"),
        "experts_per_token": read.top_k("num_experts_per_tok", normalised=normalised),
        "expert_hidden_dim": read.whole("intermediate_size"),
        "max_seq_len": read.whole("max_position_embeddings"),
        **read.rope(default_base=10_000.0),
        "norm_eps": read.number("rms_norm_eps", default=1e-5),
        "normalize_weights": normalised,
        "attention_bias": read.flag("attention_bias", default=False),
        "clip_qkv": read.number("clip_qkv", default=None),
        "tie_word_embeddings": read.flag("tie_word_embeddings", default=False),
    }
    read.only("head_dim", dim // heads)  # the norms of transformers fit no other
    read.only("hidden_act", "silu")
    read.only("attention_dropout", 0)
    read.only("sliding_window", None)  # which flash attention alone would see there
    read.finish()
    return arguments


FAMILY = Family(MODEL_TYPE, WEIGHT_MAP, builder_arguments, olmoe)
