"""A decoder from plain numbers for models of one's own: any router, any pattern of dense layers.

Released models have builders of their own in ``families``.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import nn

from moe_builders.attention.gqa import GroupedQueryAttention
from moe_builders.attention.rope import RotaryEmbedding
from moe_builders.decoder import MoEDecoder, moe_decoder
from moe_builders.errors import InputError
from moe_builders.moe import moe_layer, shared_experts
from moe_builders.ops.activations import Activation
from moe_builders.routers.capacity import Capacity
from moe_builders.routers.scores import ScoreFunction
from moe_builders.routing import Router


def moe_transformer(
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
    qk_norm: bool = True,
    rope_base: float = 10_000.0,
    norm_eps: float = 1e-6,
    tie_word_embeddings: bool = False,
    router: Router | Callable[[int], Router] | None = None,
    score_function: ScoreFunction = "softmax",
    normalize_weights: bool = True,
    route_scale: float = 1.0,
    expert_bias: bool = False,
    capacity: Capacity | None = None,
    activation: str | Activation = "swiglu",
    shared_hidden_dim: int | None = None,
    shared_gate: bool = False,
    latent_dim: int | None = None,
    moe_every_n_layers: int = 1,
    dense_layers: Sequence[int] = (),
    intermediate_dim: int | None = None,
) -> MoEDecoder:
    """Pre-norm decoder with grouped-query attention and a MoE in each layer that is not dense.

    Args:
        vocab_size: v.
        embed_dim: d.
        num_layers: layers.
        num_heads: query heads.
        num_experts: e.
        experts_per_token: k.
        expert_hidden_dim: h of one expert.
        max_seq_len: longer inputs are refused.
        num_kv_heads: None: as many as num_heads.
        head_dim: None: embed_dim / num_heads.
        qk_norm: an RMSNorm per head on queries and keys.
        rope_base: of the rotary embedding.
        norm_eps: of every RMSNorm.
        tie_word_embeddings: the output shares the embedding's weight.
        router: in place of the token-choice one; each layer gets a copy (drawn anew where a module
            knows how), or what the function gives for its number.
        score_function, normalize_weights, route_scale, expert_bias: of
            ``TokenChoiceTopKRouter``, without a router.
        capacity: of ``MoE``.
        activation: of the routed experts.
        shared_hidden_dim, shared_gate, latent_dim: of ``moe_layer``.
        moe_every_n_layers: layers n-1, 2n-1, ... have experts, the others are dense.
        dense_layers: numbers of further dense layers.
        intermediate_dim: width of dense layers.

    Raises:
        InputError: dense layers without intermediate_dim, a router that is none or takes another
            embed_dim, or a number out of its range.

    Source: the decoder of Mixtral (2401.04088) with Qwen3's norms; pattern: ST-MoE (2202.08906).
    """
    if moe_every_n_layers < 1:
        raise InputError(f"moe_every_n_layers is {moe_every_n_layers}, but must be at least 1")
    if outside := sorted(n for n in dense_layers if not 0 <= n < num_layers):
        raise InputError(f"dense_layers holds {outside}, but layers are 0 to {num_layers - 1}")
    dense = {n for n in range(num_layers) if (n + 1) % moe_every_n_layers} | set(dense_layers)
    if dense and intermediate_dim is None:
        raise InputError(f"layers {sorted(dense)} are dense: give intermediate_dim, their width")
    if head_dim is None and embed_dim % num_heads:
        raise InputError(f"num_heads is {num_heads}, but must divide embed_dim ({embed_dim})")
    width = embed_dim // num_heads if head_dim is None else head_dim
    rope = RotaryEmbedding(head_dim=width, base=rope_base)

    def attention(layer: int) -> nn.Module:
        return GroupedQueryAttention(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
            head_dim=width,
            rope=rope,
            q_norm=nn.RMSNorm(width, eps=norm_eps) if qk_norm else None,
            k_norm=nn.RMSNorm(width, eps=norm_eps) if qk_norm else None,
        )

    def mlp(layer: int) -> nn.Module:
        if layer in dense:
            assert intermediate_dim is not None
            return shared_experts(embed_dim=embed_dim, shared_hidden_dim=intermediate_dim)
        return moe_layer(
            embed_dim=embed_dim,
            expert_hidden_dim=expert_hidden_dim,
            num_experts=num_experts,
            experts_per_token=experts_per_token,
            shared_hidden_dim=shared_hidden_dim,
            shared_gate=shared_gate,
            activation=activation,
            score_function=score_function,
            normalize_weights=normalize_weights,
            route_scale=route_scale,
            expert_bias=expert_bias,
            latent_dim=latent_dim,
            capacity=capacity,
            router=_router_of_layer(router, layer),
        )

    return moe_decoder(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        head_dim=width,
        max_seq_len=max_seq_len,
        attention=attention,
        mlp=mlp,
        norm_eps=norm_eps,
        tie_word_embeddings=tie_word_embeddings,
    )


def _router_of_layer(router: Router | Callable[[int], Router] | None, layer: int) -> Router | None:
    """A layer's own router; copies of one module start from other random weights."""
    if router is None:
        return None
    if not hasattr(router, "num_experts"):
        if not callable(router):
            raise InputError(
                f"router is {router!r}, but must be a router, or a function that gives one for a "
                "layer's number: in a config {_component_: package.Name, ...}"
            )
        made: Router = router(layer)  # pyright: ignore
        return made
    own: Router = copy.deepcopy(router)  # pyright: ignore[reportAssignmentType]
    if layer > 0 and isinstance(own, nn.Module):
        for module in own.modules():
            draw = getattr(module, "reset_parameters", None)
            if draw is not None:
                bias = getattr(module, "bias", None)
                kept = None if bias is None else bias.detach().clone()
                draw()
                if (
                    bias is not None and kept is not None
                ):  # biases that a router sets to 0 stay there
                    with torch.no_grad():
                        bias.copy_(kept)
    return own
