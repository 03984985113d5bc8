"""GLM-4.5, 4.6, 4.7 and Air (glm4_moe): facts, builders, config reader, weight rows.

Source: transformers ``models/glm4_moe`` (5.23); field names of config.json in brackets below.
Sigmoid per expert plus a selection-only bias, top-k of the best groups (the releases have one
group), weights renormalised [norm_topk_prob] and scaled [routed_scaling_factor]; SwiGLU experts
without biases beside ungated shared experts, the first layers dense [first_k_dense_replace];
grouped-query attention with biases on q, k and v alone [attention_bias], in the 355B models an
RMSNorm per head on q and k before the rotary step [use_qk_norm]; half of each head is turned
[partial_rotary_factor], rotary layout half-rotated; all norms pre-norm. Layers that predict further
tokens stand after the last one on disk [num_nextn_predict_layers] and pass through to an export.
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
from moe_builders.moe import moe_layer, shared_experts

MODEL_TYPE = "glm4_moe"

WEIGHT_MAP = (
    *hf_rows.EMBEDDINGS,
    *hf_rows.PRE_NORMS,
    *hf_rows.ATTENTION,
    *hf_rows.QK_NORMS,
    *hf_rows.ROUTER,
    *hf_rows.EXPERTS,
    *hf_rows.SHARED_EXPERTS,
    *hf_rows.DENSE_MLP,
    *hf_rows.FURTHER_LAYERS,
)


def glm4_moe(
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
    shared_hidden_dim: int,
    intermediate_dim: int,
    max_seq_len: int,
    num_dense_layers: int = 1,
    num_groups: int = 1,
    groups_per_token: int = 1,
    normalize_weights: bool = True,
    route_scale: float = 1.0,
    rope_base: float = 1_000_000.0,
    rope_scaling: Mapping[str, Any] | None = None,
    rope_fraction: float = 0.5,
    norm_eps: float = 1e-5,
    attention_bias: bool = True,
    qk_norm: bool = False,
    tie_word_embeddings: bool = False,
) -> MoEDecoder:
    """A GLM-4-MoE decoder from plain numbers.

    Args:
        vocab_size: [vocab_size].
        embed_dim: [hidden_size].
        num_layers: [num_hidden_layers].
        num_heads: [num_attention_heads].
        num_kv_heads: [num_key_value_heads].
        head_dim: [head_dim]; not embed_dim / num_heads in the releases.
        num_experts: [n_routed_experts].
        experts_per_token: [num_experts_per_tok].
        expert_hidden_dim: [moe_intermediate_size], of one expert.
        shared_hidden_dim: [n_shared_experts · moe_intermediate_size], of all shared ones together.
        intermediate_dim: [intermediate_size], width of the dense layers.
        max_seq_len: [max_position_embeddings].
        num_dense_layers: [first_k_dense_replace], the first ones.
        num_groups, groups_per_token: [n_group, topk_group].
        normalize_weights: [norm_topk_prob].
        route_scale: [routed_scaling_factor].
        rope_base: [rope_theta].
        rope_scaling: [rope_scaling, rope_parameters], see ``RotaryEmbedding``.
        rope_fraction: [partial_rotary_factor].
        norm_eps: [rms_norm_eps].
        attention_bias: [attention_bias], of q, k and v.
        qk_norm: [use_qk_norm].
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
            q_norm=nn.RMSNorm(head_dim, eps=norm_eps) if qk_norm else None,
            k_norm=nn.RMSNorm(head_dim, eps=norm_eps) if qk_norm else None,
            bias=attention_bias,
            output_bias=False,
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


def glm4_5_air() -> MoEDecoder:
    """GLM-4.5-Air: 106,852,245,504 parameters, 13.42 B active.

    Source: THUDM/slime glm4.5-106B-A12B, transformers' defaults of ``Glm4MoeConfig``.
    """
    return glm4_moe(
        vocab_size=151552,
        embed_dim=4096,
        num_layers=46,
        num_heads=96,
        num_kv_heads=8,
        head_dim=128,
        num_experts=128,
        experts_per_token=8,
        expert_hidden_dim=1408,
        shared_hidden_dim=1408,
        intermediate_dim=10944,
        max_seq_len=131072,
    )


def glm4_5() -> MoEDecoder:
    """GLM-4.5: 352,797,814,784 parameters, 33.63 B active.

    Source: THUDM/slime glm4.5-355B-A32B.
    """
    return glm4_moe(
        vocab_size=151552,
        embed_dim=5120,
        num_layers=92,
        num_heads=96,
        num_kv_heads=8,
        head_dim=128,
        num_experts=160,
        experts_per_token=8,
        expert_hidden_dim=1536,
        shared_hidden_dim=1536,
        intermediate_dim=12288,
        max_seq_len=131072,
        num_dense_layers=3,
        route_scale=2.5,
        qk_norm=True,
    )


def builder_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of this model type -> arguments of ``glm4_moe``.

    Raises:
        InputError: fields this family does not honour, or needed ones that are missing; all of
            them are named.
    """
    read = ConfigReader(config, MODEL_TYPE)
    dim, heads = read.whole("hidden_size"), read.whole("num_attention_heads")
    expert_dim = read.whole("moe_intermediate_size")
    normalised = read.flag("norm_topk_prob", default=True)
    arguments = {
        "vocab_size": read.whole("vocab_size"),
        "embed_dim": dim,
        "num_layers": read.whole("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": read.whole("num_key_value_heads"),
        "head_dim": read.whole("head_dim", default=dim // heads),
        "num_experts": read.whole("n_routed_experts", "num_local_experts"),
        "experts_per_token": read.top_k("num_experts_per_tok", normalised=normalised),
        "expert_hidden_dim": expert_dim,
        "shared_hidden_dim": expert_dim * read.whole("n_shared_experts", default=1),
        "intermediate_dim": read.whole("intermediate_size"),
        "max_seq_len": read.whole("max_position_embeddings"),
        "num_dense_layers": read.whole("first_k_dense_replace", default=1, least=0),
        "num_groups": read.whole("n_group", default=1),
        "groups_per_token": read.whole("topk_group", default=1),
        "normalize_weights": normalised,
        "route_scale": read.number("routed_scaling_factor", default=1.0),
        **read.rope(default_fraction=0.5),
        "norm_eps": read.number("rms_norm_eps", default=1e-5),
        "attention_bias": read.flag("attention_bias", default=False),
        "qk_norm": read.flag("use_qk_norm", default=False),
        "tie_word_embeddings": read.flag("tie_word_embeddings", default=False),
    }
    read.only("hidden_act", "silu")
    read.only("attention_dropout", 0)
    read.only("scoring_func", "sigmoid")
    read.only("topk_method", "noaux_tc")
    read.only("moe_layer_freq", 1)
    read.ignore("aux_loss_alpha", "seq_aux", "ep_size")  # of a loss and of other programs
    read.ignore("num_nextn_predict_layers", "num_mtp_layers")  # their tensors pass through
    read.finish()
    return arguments


FAMILY = Family(MODEL_TYPE, WEIGHT_MAP, builder_arguments, glm4_moe)
