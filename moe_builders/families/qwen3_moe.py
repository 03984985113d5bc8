"""Qwen3-MoE: facts, builders, config reader, weight rows.

Source: transformers ``models/qwen3_moe`` (5.23); field names of config.json in brackets below.
Softmax over all experts, top-k, weights renormalised [norm_topk_prob]; SwiGLU experts without
biases, no shared experts; grouped-query attention with an RMSNorm per head on q and k BEFORE the
rotary step; rotary layout half-rotated; all norms pre-norm.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from moe_builders import hf_rows
from moe_builders.attention.gqa import GroupedQueryAttention
from moe_builders.attention.rope import RotaryEmbedding
from moe_builders.config_reader import ConfigReader
from moe_builders.decoder import MoEDecoder, moe_decoder
from moe_builders.errors import InputError
from moe_builders.family import Family
from moe_builders.moe import moe_layer, shared_experts

MODEL_TYPE = "qwen3_moe"

WEIGHT_MAP = (
    *hf_rows.EMBEDDINGS,
    *hf_rows.PRE_NORMS,
    *hf_rows.ATTENTION,
    *hf_rows.QK_NORMS,
    *hf_rows.ROUTER,
    *hf_rows.EXPERTS,
    *hf_rows.DENSE_MLP,
)


def qwen3_moe(
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
    rope_base: float = 1_000_000.0,
    rope_scaling: Mapping[str, Any] | None = None,
    norm_eps: float = 1e-6,
    normalize_weights: bool = True,
    attention_bias: bool = False,
    tie_word_embeddings: bool = False,
    intermediate_dim: int | None = None,
    dense_layers: Sequence[int] = (),
) -> MoEDecoder:
    """A Qwen3-MoE decoder from plain numbers.

    Args:
        vocab_size: [vocab_size].
        embed_dim: [hidden_size].
        num_layers: [num_hidden_layers].
        num_heads: [num_attention_heads].
        num_kv_heads: [num_key_value_heads].
        head_dim: [head_dim]; not embed_dim / num_heads in the releases.
        num_experts: [num_experts].
        experts_per_token: [num_experts_per_tok].
        expert_hidden_dim: [moe_intermediate_size], of one expert.
        max_seq_len: [max_position_embeddings].
        rope_base: [rope_theta].
        rope_scaling: [rope_scaling, rope_parameters], see ``RotaryEmbedding``.
        norm_eps: [rms_norm_eps].
        normalize_weights: [norm_topk_prob].
        attention_bias: [attention_bias].
        tie_word_embeddings: [tie_word_embeddings].
        intermediate_dim: [intermediate_size], width of the dense layers.
        dense_layers: numbers of layers with a dense FFN instead of experts
            [mlp_only_layers, decoder_sparse_step].

    Raises:
        InputError: dense_layers without intermediate_dim, or a number out of its range.
    """
    if dense_layers and intermediate_dim is None:
        raise InputError(f"layers {list(dense_layers)} are dense, but intermediate_dim is not set")
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
            q_norm=nn.RMSNorm(head_dim, eps=norm_eps),
            k_norm=nn.RMSNorm(head_dim, eps=norm_eps),
            bias=attention_bias,
        )

    def mlp(layer: int) -> nn.Module:
        if layer in dense_layers:
            assert intermediate_dim is not None
            return shared_experts(embed_dim=embed_dim, shared_hidden_dim=intermediate_dim)
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


def qwen3_moe_30b_a3b() -> MoEDecoder:
    """Qwen3-30B-A3B: 30,532,122,624 parameters, 3.35 B active. Source: its config.json."""
    return qwen3_moe(
        vocab_size=151936,
        embed_dim=2048,
        num_layers=48,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        num_experts=128,
        experts_per_token=8,
        expert_hidden_dim=768,
        max_seq_len=40960,
    )


def qwen3_moe_235b_a22b() -> MoEDecoder:
    """Qwen3-235B-A22B: 235,093,634,560 parameters, 22.19 B active. Source: its config.json."""
    return qwen3_moe(
        vocab_size=151936,
        embed_dim=4096,
        num_layers=94,
        num_heads=64,
        num_kv_heads=4,
        head_dim=128,
        num_experts=128,
        experts_per_token=8,
        expert_hidden_dim=1536,
        max_seq_len=40960,
    )


def qwen3_coder_480b_a35b() -> MoEDecoder:
    """Qwen3-Coder-480B-A35B-Instruct: 480,154,875,392 parameters, 35.47 B active.

    Source: its config.json.
    """
    return qwen3_moe(
        vocab_size=151936,
        embed_dim=6144,
        num_layers=62,
        num_heads=96,
        num_kv_heads=8,
        head_dim=128,
        num_experts=160,
        experts_per_token=8,
        expert_hidden_dim=2560,
        max_seq_len=262144,
        rope_base=10_000_000.0,
    )


def qwen3_moe_tiny(*, vocab_size: int = 256) -> MoEDecoder:
    """A few layers of everything, for tests and first steps; no release has this size."""
    return qwen3_moe(
        vocab_size=vocab_size,
        embed_dim=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        num_experts=8,
        experts_per_token=2,
        expert_hidden_dim=32,
        max_seq_len=512,
    )


def builder_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of this model type -> arguments of ``qwen3_moe``.

    Raises:
        InputError: fields this family does not honour, or needed ones that are missing; all of
            them are named.
    """
    read = ConfigReader(config, MODEL_TYPE)
    layers = read.whole("num_hidden_layers")
    step = read.whole("decoder_sparse_step", default=1)
    only_dense = read.layers("mlp_only_layers", num_layers=layers)
    dim, heads = read.whole("hidden_size"), read.whole("num_attention_heads")
    normalised = read.flag("norm_topk_prob", default=False)
    arguments = {
        "vocab_size": read.whole("vocab_size"),
        "embed_dim": dim,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": read.whole("num_key_value_heads"),
        "head_dim": read.whole("head_dim", default=dim // heads),
        "num_experts": read.whole("num_experts", "num_local_experts"),
        "experts_per_token": read.top_k("num_experts_per_tok", normalised=normalised),
        "expert_hidden_dim": read.whole("moe_intermediate_size"),
        "max_seq_len": read.whole("max_position_embeddings"),
        **read.rope(),
        "norm_eps": read.number("rms_norm_eps", default=1e-6),
        "normalize_weights": normalised,
        "attention_bias": read.flag("attention_bias", default=False),
        "tie_word_embeddings": read.flag("tie_word_embeddings", default=False),
        "intermediate_dim": read.whole("intermediate_size", default=None),
        "dense_layers": tuple(n for n in range(layers) if n in only_dense or (n + 1) % step != 0),
    }
    read.only("hidden_act", "silu")
    read.only("attention_dropout", 0)
    read.only("use_sliding_window", False)
    read.only("use_qk_norm", True)
    read.only("qkv_bias", False)
    read.only("shared_expert_intermediate_size", 0)
    read.ignore("max_window_layers", "sliding_window")  # of windows, which are off
    read.finish()
    return arguments


FAMILY = Family(MODEL_TYPE, WEIGHT_MAP, builder_arguments, qwen3_moe)
