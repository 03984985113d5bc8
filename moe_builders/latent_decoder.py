"""The decoder that DeepSeek-V2 and V3, Kimi-K2, Moonlight and GLM-4.7-Flash have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from moe_builders.attention.mla import MultiHeadLatentAttention, score_scale
from moe_builders.attention.rope import RotaryEmbedding
from moe_builders.decoder import MoEDecoder, moe_decoder
from moe_builders.moe import moe_layer, shared_experts
from moe_builders.routers.scores import ScoreFunction


def latent_moe_decoder(
    *,
    vocab_size: int,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    q_lora_rank: int | None,
    kv_lora_rank: int,
    qk_nope_head_dim: int,
    qk_rope_head_dim: int,
    v_head_dim: int,
    num_experts: int,
    experts_per_token: int,
    expert_hidden_dim: int,
    shared_hidden_dim: int,
    intermediate_dim: int,
    max_seq_len: int,
    dense_layers: Sequence[int] = (0,),
    score_function: ScoreFunction = "sigmoid",
    expert_bias: bool = True,
    num_groups: int = 1,
    groups_per_token: int = 1,
    group_score_topk: int = 2,
    normalize_weights: bool = True,
    route_scale: float = 1.0,
    rope_base: float = 10_000.0,
    rope_scaling: Mapping[str, Any] | None = None,
    rope_interleaved: bool = True,
    rope_in_fp32: bool = False,
    norm_eps: float = 1e-6,
    attention_bias: bool = False,
    tie_word_embeddings: bool = False,
) -> MoEDecoder:
    """Latent attention, experts beside ungated shared ones, some layers dense, from plain numbers.

    Args:
        vocab_size: [vocab_size].
        embed_dim: [hidden_size].
        num_layers: [num_hidden_layers].
        num_heads: [num_attention_heads].
        q_lora_rank, kv_lora_rank: [q_lora_rank, kv_lora_rank], widths of the latents; None: the
            queries have none.
        qk_nope_head_dim, qk_rope_head_dim, v_head_dim: fields of these names.
        num_experts: [n_routed_experts].
        experts_per_token: [num_experts_per_tok].
        expert_hidden_dim: [moe_intermediate_size], of one expert.
        shared_hidden_dim: [n_shared_experts · moe_intermediate_size], of all shared ones together.
        intermediate_dim: [intermediate_size], width of the dense layers.
        max_seq_len: [max_position_embeddings].
        dense_layers: numbers of layers with a dense FFN instead of experts
            [first_k_dense_replace, mlp_layer_types].
        score_function, expert_bias, group_score_topk: of ``TokenChoiceTopKRouter``.
        num_groups, groups_per_token: [n_group, topk_group].
        normalize_weights: [norm_topk_prob].
        route_scale: [routed_scaling_factor].
        rope_base: [rope_theta].
        rope_scaling: [rope_scaling, rope_parameters], see ``RotaryEmbedding``; its mscale² is in
            the scale of the scores.
        rope_interleaved: [rope_interleave].
        rope_in_fp32: turn in fp32, see ``RotaryEmbedding``.
        norm_eps: [rms_norm_eps]; the latents' norms have 1e-6.
        attention_bias: [attention_bias], of the projections down to the latents and of the output.
        tie_word_embeddings: [tie_word_embeddings].

    Raises:
        InputError: a number out of its range.
    """
    rope = RotaryEmbedding(
        head_dim=qk_rope_head_dim,
        base=rope_base,
        scaling=rope_scaling,
        interleaved=rope_interleaved,
        max_seq_len=max_seq_len,
        in_fp32=rope_in_fp32,
    )
    head_dim = qk_nope_head_dim + qk_rope_head_dim

    def attention(layer: int) -> nn.Module:
        return MultiHeadLatentAttention(
            embed_dim=embed_dim,
            num_heads=num_heads,
            q_lora_rank=q_lora_rank,
            kv_lora_rank=kv_lora_rank,
            qk_nope_head_dim=qk_nope_head_dim,
            qk_rope_head_dim=qk_rope_head_dim,
            v_head_dim=v_head_dim,
            rope=rope,
            scale=score_scale(head_dim, rope),
            bias=attention_bias,
        )

    def mlp(layer: int) -> nn.Module:
        if layer in dense_layers:
            return shared_experts(embed_dim=embed_dim, shared_hidden_dim=intermediate_dim)
        return moe_layer(
            embed_dim=embed_dim,
            expert_hidden_dim=expert_hidden_dim,
            num_experts=num_experts,
            experts_per_token=experts_per_token,
            shared_hidden_dim=shared_hidden_dim,
            score_function=score_function,
            normalize_weights=normalize_weights,
            route_scale=route_scale,
            expert_bias=expert_bias,
            num_groups=num_groups,
            groups_per_token=groups_per_token,
            group_score_topk=group_score_topk,
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
