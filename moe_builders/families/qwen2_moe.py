"""Qwen2-MoE: facts, builders, config reader, weight rows.

Source: transformers ``models/qwen2_moe`` (5.23); field names of config.json in brackets below.
Softmax over all experts, top-k, weights not renormalised in the releases [norm_topk_prob]; SwiGLU
experts without biases beside one shared expert whose answer a sigmoid gates; grouped-query
attention with biases on q, k and v only, no q/k norms; some layers may see a window; rotary layout
half-rotated; all norms pre-norm.
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

MODEL_TYPE = "qwen2_moe"

WEIGHT_MAP = (
    *hf_rows.EMBEDDINGS,
    *hf_rows.PRE_NORMS,
    *hf_rows.ATTENTION,
    *hf_rows.ROUTER,
    *hf_rows.EXPERTS,
    *hf_rows.GATED_SHARED_EXPERT,
    *hf_rows.DENSE_MLP,
)


def qwen2_moe(
    *,
    vocab_size: int,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    num_experts: int,
    experts_per_token: int,
    expert_hidden_dim: int,
    shared_hidden_dim: int,
    max_seq_len: int,
    head_dim: int | None = None,
    rope_base: float = 10_000.0,
    rope_scaling: Mapping[str, Any] | None = None,
    norm_eps: float = 1e-6,
    normalize_weights: bool = False,
    attention_bias: bool = True,
    tie_word_embeddings: bool = False,
    intermediate_dim: int | None = None,
    dense_layers: Sequence[int] = (),
    window: int | None = None,
    window_layers: Sequence[int] = (),
) -> MoEDecoder:
    """A Qwen2-MoE decoder from plain numbers.

    Args:
        vocab_size: [vocab_size].
        embed_dim: [hidden_size].
        num_layers: [num_hidden_layers].
        num_heads: [num_attention_heads].
        num_kv_heads: [num_key_value_heads].
        num_experts: [num_experts].
        experts_per_token: [num_experts_per_tok].
        expert_hidden_dim: [moe_intermediate_size], of one expert.
        shared_hidden_dim: [shared_expert_intermediate_size].
        max_seq_len: [max_position_embeddings].
        head_dim: [head_dim]; None: embed_dim / num_heads.
        rope_base: [rope_theta].
        rope_scaling: [rope_scaling, rope_parameters], see ``RotaryEmbedding``.
        norm_eps: [rms_norm_eps].
        normalize_weights: [norm_topk_prob].
        attention_bias: [qkv_bias], of the q, k and v projections.
        tie_word_embeddings: [tie_word_embeddings].
        intermediate_dim: [intermediate_size], width of the dense layers.
        dense_layers: numbers of layers with a dense FFN instead of experts
            [mlp_only_layers, decoder_sparse_step].
        window: [sliding_window], positions that a query sees in window_layers.
        window_layers: numbers of layers with a window
            [layer_types, or use_sliding_window and max_window_layers].

    Raises:
        InputError: dense_layers without intermediate_dim, window_layers without window, or a
            number out of its range.
    """
    if dense_layers and intermediate_dim is None:
        raise InputError(f"layers {list(dense_layers)} are dense, but intermediate_dim is not set")
    if window_layers and window is None:
        raise InputError(f"layers {list(window_layers)} have a window, but window is not set")
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
            output_bias=False,
            window=window if layer in window_layers else None,
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
            shared_hidden_dim=shared_hidden_dim,
            shared_gate=True,
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


def qwen1_5_moe_a2_7b() -> MoEDecoder:
    """Qwen1.5-MoE-A2.7B-Chat: 14,315,784,192 parameters, 2.69 B active. Source: its config.json."""
    return qwen2_moe(
        vocab_size=151936,
        embed_dim=2048,
        num_layers=24,
        num_heads=16,
        num_kv_heads=16,
        num_experts=60,
        experts_per_token=4,
        expert_hidden_dim=1408,
        shared_hidden_dim=5632,
        max_seq_len=32768,
        rope_base=1_000_000.0,
    )


def qwen2_moe_57b_a14b() -> MoEDecoder:
    """Qwen2-57B-A14B: 57,408,658,944 parameters, 14.25 B active. Source: its config.json."""
    return qwen2_moe(
        vocab_size=151936,
        embed_dim=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        num_experts=64,
        experts_per_token=8,
        expert_hidden_dim=2560,
        shared_hidden_dim=20480,
        max_seq_len=131072,
        rope_base=1_000_000.0,
    )


def builder_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of this model type -> arguments of ``qwen2_moe``.

    Raises:
        InputError: fields this family does not honour, or needed ones that are missing; all of
            them are named.
    """
    read = ConfigReader(config, MODEL_TYPE)
    layers = read.whole("num_hidden_layers")
    step = read.whole("decoder_sparse_step", default=1)
    only_dense = read.layers("mlp_only_layers", num_layers=layers)
    normalised = read.flag("norm_topk_prob", default=False)
    window, window_layers = _windows(read, layers)
    arguments = {
        "vocab_size": read.whole("vocab_size"),
        "embed_dim": read.whole("hidden_size"),
        "num_layers": layers,
        "num_heads": read.whole("num_attention_heads"),
        "num_kv_heads": read.whole("num_key_value_heads"),
        "head_dim": read.whole("head_dim", default=None),
        "num_experts": read.whole("num_experts"),
        "experts_per_token": read.top_k("num_experts_per_tok", normalised=normalised),
        "expert_hidden_dim": read.whole("moe_intermediate_size"),
        "shared_hidden_dim": read.whole("shared_expert_intermediate_size"),
        "max_seq_len": read.whole("max_position_embeddings"),
        **read.rope(),
        "norm_eps": read.number("rms_norm_eps", default=1e-6),
        "normalize_weights": normalised,
        "attention_bias": read.flag("qkv_bias", default=True),
        "tie_word_embeddings": read.flag("tie_word_embeddings", default=False),
        "intermediate_dim": read.whole("intermediate_size", default=None),
        "dense_layers": tuple(n for n in range(layers) if n in only_dense or (n + 1) % step != 0),
        "window": window,
        "window_layers": window_layers,
    }
    read.only("hidden_act", "silu")
    read.only("attention_dropout", 0)
    read.finish()
    return arguments


def _windows(read: ConfigReader, layers: int) -> tuple[int | None, tuple[int, ...]]:
    """Window and the layers that have it: every second one below max_window_layers by default."""
    full, sliding = "full_attention", "sliding_attention"
    on = read.flag("use_sliding_window", default=False)
    below = read.whole("max_window_layers", default=28, least=0)
    kinds = read.words(
        "layer_types",
        num_layers=layers,
        allowed=(full, sliding),
        default=tuple(sliding if on and n % 2 == 0 and n < below else full for n in range(layers)),
    )
    window_layers = tuple(n for n, kind in enumerate(kinds) if kind == sliding)
    if not on and window_layers:
        read.refuse("layer_types", "windows need use_sliding_window")
    if not on:
        read.ignore("sliding_window")
        return None, ()
    return read.whole("sliding_window"), window_layers


FAMILY = Family(MODEL_TYPE, WEIGHT_MAP, builder_arguments, qwen2_moe)
