"""FlexOlmo: facts, builder, config reader, weight rows.

Source: transformers ``models/flex_olmo`` (5.23); field names of config.json in brackets below.
Softmax over all experts, top-k, weights renormalised or not [norm_topk_prob]; SwiGLU experts
without biases in every layer, no shared experts; attention with one RMSNorm over all heads of q and
one over all of k, before the rotary step, which is computed in fp32; rotary layout half-rotated; a
layer's norms see what comes out of attention and experts, nothing is normalised before them.

There is no builder of a released size: how many experts a token takes in FlexOlmo-7x7B-1T has no
source that others do not contradict. Its folder is read as any other.
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

MODEL_TYPE = "flex_olmo"

WEIGHT_MAP = (
    *hf_rows.EMBEDDINGS,
    *hf_rows.rename_layer(
        sa_scale__weight="post_attention_layernorm.weight",
        mlp_scale__weight="post_feedforward_layernorm.weight",
    ),
    *hf_rows.ATTENTION,
    *hf_rows.QK_NORMS,
    *hf_rows.ROUTER,
    *hf_rows.EXPERTS,
)


def flex_olmo(
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
    head_dim: int | None = None,
    rope_base: float = 500_000.0,
    rope_scaling: Mapping[str, Any] | None = None,
    norm_eps: float = 1e-6,
    normalize_weights: bool = False,
    attention_bias: bool = False,
    tie_word_embeddings: bool = False,
) -> MoEDecoder:
    """A FlexOlmo decoder from plain numbers.

    Args:
        vocab_size: [vocab_size].
        embed_dim: [hidden_size].
        num_layers: [num_hidden_layers].
        num_heads: [num_attention_heads].
        num_experts: [num_experts].
        experts_per_token: [num_experts_per_tok].
        expert_hidden_dim: [intermediate_size], of one expert.
        max_seq_len: [max_position_embeddings].
        num_kv_heads: [num_key_value_heads]; None: num_heads.
        head_dim: [head_dim]; None: embed_dim / num_heads.
        rope_base: [rope_theta].
        rope_scaling: [rope_scaling, rope_parameters], see ``RotaryEmbedding``.
        norm_eps: [rms_norm_eps].
        normalize_weights: [norm_topk_prob].
        attention_bias: [attention_bias], of all four projections.
        tie_word_embeddings: [tie_word_embeddings].

    Raises:
        InputError: a number out of its range.
    """
    num_kv_heads = num_kv_heads or num_heads
    head_dim = head_dim or embed_dim // num_heads
    rope = RotaryEmbedding(
        head_dim=head_dim,
        base=rope_base,
        scaling=rope_scaling,
        max_seq_len=max_seq_len,
        in_fp32=True,
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
        norm_position="after",
    )


def builder_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of this model type -> arguments of ``flex_olmo``.

    Raises:
        InputError: fields this family does not honour, or needed ones that are missing; all of
            them are named.
    """
    read = ConfigReader(config, MODEL_TYPE)
    heads = read.whole("num_attention_heads")
    normalised = read.flag("norm_topk_prob", default=False)
    arguments = {
        "vocab_size": read.whole("vocab_size"),
        "embed_dim": read.whole("hidden_size"),
        "num_layers": read.whole("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": read.whole("num_key_value_heads", default=heads),
        "head_dim": read.whole("head_dim", default=None),
        "num_experts": read.whole("num_experts", "num_local_experts"),
        "experts_per_token": read.top_k("num_experts_per_tok", normalised=normalised),
        "expert_hidden_dim": read.whole("intermediate_size"),
        "max_seq_len": read.whole("max_position_embeddings"),
        **read.rope(default_base=500_000.0),
        "norm_eps": read.number("rms_norm_eps", default=1e-6),
        "normalize_weights": normalised,
        "attention_bias": read.flag("attention_bias", default=False),
        "tie_word_embeddings": read.flag("tie_word_embeddings", default=False),
    }
    read.only("hidden_act", "silu")
    read.only("attention_dropout", 0)
    read.finish()
    return arguments


FAMILY = Family(MODEL_TYPE, WEIGHT_MAP, builder_arguments, flex_olmo)
