"""Granite-MoE, with and without shared experts: facts, builder, config readers, weight rows.

Source: transformers ``models/granitemoe`` and ``models/granitemoeshared`` (5.23); field names of
config.json in brackets below. The top-k of the logits, then a softmax over these k; SwiGLU experts
without biases in every layer, stored as one tensor for gate and up; granitemoeshared adds a shared
SwiGLU network in that layout; grouped-query attention without q/k norms; rotary layout
half-rotated; all norms pre-norm. Multipliers of the embeddings, of q·k (in place of r^-½), of what
attention and MoE add, and a divisor of the logits.

No builder of a released size: the multipliers of the 3B have no source, those of the 1B none with a
name. Their config.json says all that is needed.
"""

import functools
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
from moe_builders.weights import Split

MODEL_TYPE = "granitemoe"
SHARED_MODEL_TYPE = "granitemoeshared"

WEIGHT_MAP = (
    *hf_rows.EMBEDDINGS,
    *hf_rows.PRE_NORMS,
    *hf_rows.ATTENTION,
    *hf_rows.rename_layer(
        mlp__router__gate__weight="block_sparse_moe.router.layer.weight",
        mlp__experts__gate_up_proj="block_sparse_moe.input_linear.weight",
        mlp__experts__down_proj="block_sparse_moe.output_linear.weight",
        mlp__shared_experts__w2__weight="shared_mlp.output_linear.weight",
    ),
    Split(
        "model.layers.{l}.shared_mlp.input_linear.weight",
        ("layers.{l}.mlp.shared_experts.w1.weight", "layers.{l}.mlp.shared_experts.w3.weight"),
    ),
)


def granitemoe(
    *,
    vocab_size: int,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    num_experts: int,
    experts_per_token: int,
    expert_hidden_dim: int,
    max_seq_len: int,
    head_dim: int | None = None,
    shared_hidden_dim: int | None = None,
    rope_base: float = 10_000.0,
    rope_scaling: Mapping[str, Any] | None = None,
    norm_eps: float = 1e-6,
    embedding_multiplier: float = 1.0,
    attention_multiplier: float = 1.0,
    residual_multiplier: float = 1.0,
    logits_scaling: float = 1.0,
    attention_bias: bool = False,
    attention_dropout: float = 0.0,
    tie_word_embeddings: bool = False,
) -> MoEDecoder:
    """A Granite-MoE decoder from plain numbers.

    Args:
        vocab_size: [vocab_size].
        embed_dim: [hidden_size].
        num_layers: [num_hidden_layers].
        num_heads: [num_attention_heads].
        num_kv_heads: [num_key_value_heads].
        num_experts: [num_local_experts].
        experts_per_token: [num_experts_per_tok].
        expert_hidden_dim: [intermediate_size], of one expert.
        max_seq_len: [max_position_embeddings].
        head_dim: [head_dim]; None: embed_dim / num_heads.
        shared_hidden_dim: [shared_intermediate_size]; None: no shared experts.
        rope_base: [rope_theta].
        rope_scaling: [rope_scaling, rope_parameters], see ``RotaryEmbedding``.
        norm_eps: [rms_norm_eps].
        embedding_multiplier: [embedding_multiplier].
        attention_multiplier: [attention_multiplier], of q·k; head_dim^-½ has no part in it.
        residual_multiplier: [residual_multiplier], of what attention and MoE add.
        logits_scaling: [logits_scaling]; logits are divided by it.
        attention_bias: [attention_bias], of all four projections.
        attention_dropout: [attention_dropout], in training.
        tie_word_embeddings: [tie_word_embeddings].

    Raises:
        InputError: a number out of its range.
    """
    head_dim = head_dim or embed_dim // num_heads
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
            bias=attention_bias,
            scale=attention_multiplier,
            dropout=attention_dropout,
        )

    def mlp(layer: int) -> nn.Module:
        return moe_layer(
            embed_dim=embed_dim,
            expert_hidden_dim=expert_hidden_dim,
            num_experts=num_experts,
            experts_per_token=experts_per_token,
            shared_hidden_dim=shared_hidden_dim,
            score_function="topk_softmax",
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
        residual_scale=residual_multiplier,
        embedding_scale=embedding_multiplier,
        logits_scale=1 / logits_scaling,
    )


def builder_arguments(config: Mapping[str, Any], *, model_type: str = MODEL_TYPE) -> dict[str, Any]:
    """config.json of this model type -> arguments of ``granitemoe``.

    Args:
        config: config.json.
        model_type: granitemoe or granitemoeshared; the first knows no shared experts.

    Raises:
        InputError: fields this family does not honour, or needed ones that are missing; all of
            them are named.
    """
    read = ConfigReader(config, model_type)
    heads = read.whole("num_attention_heads")
    arguments = {
        "vocab_size": read.whole("vocab_size"),
        "embed_dim": read.whole("hidden_size"),
        "num_layers": read.whole("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": read.whole("num_key_value_heads", default=heads),
        "num_experts": read.whole("num_local_experts"),
        "experts_per_token": read.top_k("num_experts_per_tok", normalised=True),
        "expert_hidden_dim": read.whole("intermediate_size"),
        "max_seq_len": read.whole("max_position_embeddings"),
        "head_dim": read.whole("head_dim", default=None),
        **read.rope(default_base=10_000.0),
        "norm_eps": read.number("rms_norm_eps", default=1e-6),
        "embedding_multiplier": read.number("embedding_multiplier", default=1.0),
        "attention_multiplier": read.number("attention_multiplier", default=1.0),
        "residual_multiplier": read.number("residual_multiplier", default=1.0),
        "logits_scaling": read.number("logits_scaling", default=1.0),
        "attention_bias": read.flag("attention_bias", default=False),
        "attention_dropout": read.share("attention_dropout"),
        "tie_word_embeddings": read.flag("tie_word_embeddings", default=False),
    }
    if model_type == SHARED_MODEL_TYPE:
        shared = read.whole("shared_intermediate_size", default=0, least=0)
        arguments["shared_hidden_dim"] = shared or None
    read.only("hidden_act", "silu")
    read.finish()
    return arguments


FAMILY = Family(MODEL_TYPE, WEIGHT_MAP, builder_arguments, granitemoe)
SHARED_FAMILY = Family(
    SHARED_MODEL_TYPE,
    WEIGHT_MAP,
    functools.partial(builder_arguments, model_type=SHARED_MODEL_TYPE),
    granitemoe,
)
