"""dots.llm1 (dots1): facts, builders, config reader, weight rows.

Source: transformers ``models/dots1`` (5.23); field names of config.json in brackets below.
Sigmoid per expert plus a selection-only bias, top-k of the best groups (the release has one group),
weights renormalised [norm_topk_prob] and scaled [routed_scaling_factor]; SwiGLU experts without
biases beside ungated shared experts, the first layers dense [first_k_dense_replace]; attention with
an RMSNorm per head on q and k BEFORE the rotary step, windows in some layers [layer_types] (in none
of the release's), biases on all four projections or on none [attention_bias]; rotary layout
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

MODEL_TYPE = "dots1"

WEIGHT_MAP = (
    *hf_rows.EMBEDDINGS,
    *hf_rows.PRE_NORMS,
    *hf_rows.ATTENTION,
    *hf_rows.QK_NORMS,
    *hf_rows.ROUTER,
    *hf_rows.EXPERTS,
    *hf_rows.SHARED_EXPERTS,
    *hf_rows.DENSE_MLP,
)


def dots1(
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
    intermediate_dim: int,
    max_seq_len: int,
    head_dim: int | None = None,
    num_dense_layers: int = 1,
    num_groups: int = 1,
    groups_per_token: int = 1,
    normalize_weights: bool = True,
    route_scale: float = 1.0,
    rope_base: float = 10_000_000.0,
    rope_scaling: Mapping[str, Any] | None = None,
    norm_eps: float = 1e-5,
    window: int | None = None,
    window_layers: Sequence[int] = (),
    attention_bias: bool = False,
    tie_word_embeddings: bool = False,
) -> MoEDecoder:
    """A dots1 decoder from plain numbers.

    Args:
        vocab_size: [vocab_size].
        embed_dim: [hidden_size].
        num_layers: [num_hidden_layers].
        num_heads: [num_attention_heads].
        num_kv_heads: [num_key_value_heads].
        num_experts: [n_routed_experts].
        experts_per_token: [num_experts_per_tok].
        expert_hidden_dim: [moe_intermediate_size], of one expert.
        shared_hidden_dim: [n_shared_experts · moe_intermediate_size], of all shared ones together.
        intermediate_dim: [intermediate_size], width of the dense layers.
        max_seq_len: [max_position_embeddings].
        head_dim: [head_dim]; None: embed_dim / num_heads.
        num_dense_layers: [first_k_dense_replace], the first ones.
        num_groups, groups_per_token: [n_group, topk_group].
        normalize_weights: [norm_topk_prob].
        route_scale: [routed_scaling_factor].
        rope_base: [rope_theta].
        rope_scaling: [rope_scaling, rope_parameters], see ``RotaryEmbedding``.
        norm_eps: [rms_norm_eps].
        window: [sliding_window], positions that a query of the window_layers sees.
        window_layers: numbers of the layers that have it [layer_types, max_window_layers].
        attention_bias: [attention_bias], of q, k, v and output.
        tie_word_embeddings: [tie_word_embeddings].

    Raises:
        InputError: window_layers without window, or a number out of its range.
    """
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
            q_norm=nn.RMSNorm(head_dim, eps=norm_eps),
            k_norm=nn.RMSNorm(head_dim, eps=norm_eps),
            bias=attention_bias,
            window=window if layer in window_layers else None,
        )

    def mlp(layer: int) -> nn.Module:
        if layer < num_dense_layers:
            return shared_experts(embed_dim=embed_dim, shared_hidden_dim=intermediate_dim)
        return moe_layer(
            embed_dim=embed_dim,
            expert_hidden_dim=expert_hidden_dim,
            num_experts=num_experts,
            experts_per_token=experts_per_token,
            shared_hidden_dim=shared_hidden_dim,
            score_function="sigmoid",
            normalize_weights=normalize_weights,
            route_scale=route_scale,
            expert_bias=True,
            num_groups=num_groups,
            groups_per_token=groups_per_token,
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


def dots_llm1() -> MoEDecoder:
    """dots.llm1, base and inst: 142,774,373,888 parameters, 14.02 B active.

    Source: lablup/mlxcel src/models/dots1_tests.rs.
    """
    return dots1(
        vocab_size=152064,
        embed_dim=4096,
        num_layers=62,
        num_heads=32,
        num_kv_heads=32,
        num_experts=128,
        experts_per_token=6,
        expert_hidden_dim=1408,
        shared_hidden_dim=2816,
        intermediate_dim=10944,
        max_seq_len=32768,
        route_scale=2.5,
    )


def builder_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of this model type -> arguments of ``dots1``.

    Raises:
        InputError: fields this family does not honour, or needed ones that are missing; all of
            them are named.
    """
    read = ConfigReader(config, MODEL_TYPE)
    layers, heads = read.whole("num_hidden_layers"), read.whole("num_attention_heads")
    expert_dim = read.whole("moe_intermediate_size")
    normalised = read.flag("norm_topk_prob", default=False)
    # null and left out are two things to transformers here: no window or 4096, num_heads or 32
    kv_heads = read.whole(
        "num_key_value_heads", default=heads if "num_key_value_heads" in config else 32
    )
    window = read.whole("sliding_window", default=None if "sliding_window" in config else 4096)
    first = read.whole("max_window_layers", default=62, least=0)
    full = layers if window is None else first  # layers before this one have no window
    kinds = read.words(
        "layer_types",
        num_layers=layers,
        allowed=("full_attention", "sliding_attention"),
        default=["full_attention" if n < full else "sliding_attention" for n in range(layers)],
    )
    arguments = {
        "vocab_size": read.whole("vocab_size"),
        "embed_dim": read.whole("hidden_size"),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "num_experts": read.whole("n_routed_experts", "num_local_experts"),
        "experts_per_token": read.top_k("num_experts_per_tok", normalised=normalised),
        "expert_hidden_dim": expert_dim,
        "shared_hidden_dim": expert_dim * read.whole("n_shared_experts"),
        "intermediate_dim": read.whole("intermediate_size"),
        "max_seq_len": read.whole("max_position_embeddings"),
        "head_dim": read.whole("head_dim", default=None),
        "num_dense_layers": read.whole("first_k_dense_replace", default=0, least=0),
        "num_groups": read.whole("n_group", default=1),
        "groups_per_token": read.whole("topk_group", default=1),
        "normalize_weights": normalised,
        "route_scale": read.number("routed_scaling_factor", default=1.0),
        **read.rope(),
        "norm_eps": read.number("rms_norm_eps", default=1e-6),
        "window": window,
        "window_layers": tuple(n for n, kind in enumerate(kinds) if kind == "sliding_attention"),
        "attention_bias": read.flag("attention_bias", default=False),
        "tie_word_embeddings": read.flag("tie_word_embeddings", default=False),
    }
    read.only("hidden_act", "silu")
    read.only("attention_dropout", 0)
    read.only("moe_layer_freq", 1)
    read.only("scoring_func", "sigmoid", "noaux_tc")  # two names for one function
    read.only("topk_method", "noaux_tc")
    read.ignore("aux_loss_alpha", "seq_aux", "ep_size")  # of a loss and of other programs
    # transformers does not read use_sliding_window: false beside windows is a contradiction
    read.only("use_sliding_window", *((True,) if arguments["window_layers"] else (False, True)))
    read.finish()
    return arguments


FAMILY = Family(MODEL_TYPE, WEIGHT_MAP, builder_arguments, dots1)
