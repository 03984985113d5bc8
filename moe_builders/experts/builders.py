"""Routed and shared experts from plain numbers."""

from torch import nn
from torchtune.modules import FeedForward

from moe_builders.experts.expert_list import ExpertNetwork
from moe_builders.experts.grouped import GroupedExperts
from moe_builders.ops.activations import Activation


def moe_experts(
    *,
    embed_dim: int,
    expert_hidden_dim: int,
    num_experts: int,
    activation: str | Activation = "swiglu",
    bias: bool = False,
    hidden_scale: bool = False,
    dropout: float = 0.0,
) -> GroupedExperts:
    """Routed experts from plain numbers; see ``GroupedExperts``."""
    return GroupedExperts(
        dim=embed_dim,
        hidden_dim=expert_hidden_dim,
        num_experts=num_experts,
        activation=activation,
        bias=bias,
        hidden_scale=hidden_scale,
        dropout=dropout,
    )


def shared_experts(
    *,
    embed_dim: int,
    shared_hidden_dim: int,
    bias: bool = False,
    activation: str | Activation = "swiglu",
) -> FeedForward | ExpertNetwork:
    """Always-on experts as one network; n experts of width h are one of width n·h.

    SwiGLU is torchtune's ``FeedForward``; any other activation makes an ``ExpertNetwork``.
    """
    if activation != "swiglu":
        return ExpertNetwork(
            dim=embed_dim, hidden_dim=shared_hidden_dim, activation=activation, bias=bias
        )
    return FeedForward(
        gate_proj=nn.Linear(embed_dim, shared_hidden_dim, bias=bias),
        up_proj=nn.Linear(embed_dim, shared_hidden_dim, bias=bias),
        down_proj=nn.Linear(shared_hidden_dim, embed_dim, bias=bias),
    )


def latent_projection(in_dim: int, out_dim: int, *, bias: bool) -> nn.Linear:
    """Into or out of the space that routed experts work in; the bias begins at 0."""
    projection = nn.Linear(in_dim, out_dim, bias=bias)
    if bias:
        nn.init.zeros_(projection.bias)
    return projection
