"""Mixtral: facts, builders, config reader, weight rows.

Source: transformers ``models/mixtral`` (5.23); field names of config.json in brackets below.
Softmax over all experts, top-k, weights always renormalised; SwiGLU experts without biases in
every layer, no shared experts; grouped-query attention without biases or q/k norms; rotary layout
half-rotated; all norms pre-norm.
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

MODEL_TYPE = "mixtral"

WEIGHT_MAP = (
    *hf_rows.EMBEDDINGS,
    *hf_rows.PRE_NORMS,
    *hf_rows.ATTENTION,
    *hf_rows.MIXTRAL_EXPERTS,
)


def mixtral(
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
    rope_base: float = 1_000_000.0,
    rope_scaling: Mapping[str, Any] | None = None,
    norm_eps: float = 1e-5,
    window: int | None = None,
    tie_word_embeddings: bool = False,
) -> MoEDecoder:
    """A Mixtral decoder from plain numbers.

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
        rope_base: [rope_theta].
        rope_scaling: [rope_scaling, rope_parameters], see ``RotaryEmbedding``.
        norm_eps: [rms_norm_eps].
        window: [sliding_window], positions that a query sees; None: all before it.
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
            window=window,
        )

    def mlp(layer: int) -> nn.Module:
        return moe_layer(
            embed_dim=embed_dim,
            expert_hidden_dim=expert_hidden_dim,
            num_experts=num_experts,
            experts_per_token=experts_per_token,
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


def mixtral_8x7b() -> MoEDecoder:
    """Mixtral 8x7B: 46,702,792,704 parameters, 12.88 B active. Source: its config.json."""
    return mixtral(
        vocab_size=32000,
        embed_dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        num_experts=8,
        experts_per_token=2,
        expert_hidden_dim=14336,
        max_seq_len=32768,
    )


def mixtral_8x22b(*, vocab_size: int = 32000) -> MoEDecoder:
    """Mixtral 8x22B v0.1: 140,620,634,112 parameters, 39.15 B active. Source: its config.json.

    Args:
        vocab_size: 32768 for Instruct v0.1, which has 140,630,071,296 parameters.
    """
    return mixtral(
        vocab_size=vocab_size,
        embed_dim=6144,
        num_layers=56,
        num_heads=48,
        num_kv_heads=8,
        num_experts=8,
        experts_per_token=2,
        expert_hidden_dim=16384,
        max_seq_len=65536,
    )


def builder_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of this model type -> arguments of ``mixtral``.

    Raises:
        InputError: fields this family does not honour, or needed ones that are missing; all of
            them are named.
    """
    read = ConfigReader(config, MODEL_TYPE)
    arguments = {
        "vocab_size": read.whole("vocab_size"),
        "embed_dim": read.whole("hidden_size"),
        "num_layers": read.whole("num_hidden_layers"),
        "num_heads": read.whole("num_attention_heads"),
        "num_kv_heads": read.whole("num_key_value_heads"),
        "num_experts": read.whole("num_local_experts", "num_experts"),
        "experts_per_token": read.top_k("num_experts_per_tok", normalised=True),
        "expert_hidden_dim": read.whole("intermediate_size"),
        "max_seq_len": read.whole("max_position_embeddings"),
        "head_dim": read.whole("head_dim", default=None),
        **read.rope(default_base=1_000_000.0),
        "norm_eps": read.number("rms_norm_eps", default=1e-5),
        "window": read.whole("sliding_window", default=None),
        "tie_word_embeddings": read.flag("tie_word_embeddings", default=False),
    }
    read.only("hidden_act", "silu")
    read.only("attention_dropout", 0)
    read.only("router_jitter_noise", 0)  # of the layer's input, in training
    read.finish()
    return arguments


FAMILY = Family(MODEL_TYPE, WEIGHT_MAP, builder_arguments, mixtral)
