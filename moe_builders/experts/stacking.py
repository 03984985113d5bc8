"""One expert a module, or all stacked in ``GroupedExperts``: either from the other, to the bit.

Letters: e num_experts · d dim · h hidden_dim of an expert.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchtune.modules import FeedForward

from moe_builders.errors import InputError
from moe_builders.experts.expert_list import ExpertList, ExpertNetwork
from moe_builders.experts.grouped import GroupedExperts
from moe_builders.ops.activations import ACTIVATIONS, Activation


@dataclass(frozen=True)
class ExpertKind:
    """What networks must share to be stacked."""

    dim: int
    hidden_dim: int
    activation: Activation
    bias: bool
    hidden_scale: bool
    dropout: float


def split_experts(experts: GroupedExperts) -> ExpertList:
    """A network for each expert, with copies of its weights to the bit.

    SwiGLU becomes torchtune's ``FeedForward``; what that cannot do, an ``ExpertNetwork``.

    Args:
        experts: not sharded.
    """
    kind = ExpertKind(
        dim=experts.dim,
        hidden_dim=experts.hidden_dim,
        activation=experts.activation,
        bias=experts.down_bias is not None,
        hidden_scale=experts.hidden_scale is not None,
        dropout=experts.dropout,
    )
    networks = []
    for number in range(experts.num_experts):
        with torch.device("meta"):
            network = _build(kind)
        state, learns = {}, {}
        for stacked, names in _part_names(network).items():
            whole = experts.get_parameter(stacked)
            parts = whole.detach()[number].chunk(len(names))  # gate rows, up rows
            state |= {name: part.clone() for name, part in zip(names, parts, strict=True)}
            learns |= dict.fromkeys(names, whole.requires_grad)
        networks.append(_filled(network, state, learns))
    return ExpertList(networks).train(experts.training)


def merge_experts(experts: ExpertList, *, backend: str = "auto") -> GroupedExperts:
    """Stacked copies of a list's weights: the reverse of ``split_experts``.

    Args:
        experts: networks of one kind, not sharded.
        backend: of ``GroupedExperts``.

    Raises:
        InputError: a network that cannot be stacked, or one that differs from the first in kind,
            in dtype, in device or in what is frozen.
    """
    kind, state, learns = common_kind(experts), {}, {}
    for stacked, networks in stacked_parts(experts).items():
        parts = [part for own in networks for part in own]
        for what in ("dtype", "device", "requires_grad"):
            values = {str(getattr(part, what)) for part in parts}
            if len(values) > 1:
                raise InputError(
                    f"{what} of the experts' {stacked} is {' here, '.join(sorted(values))} there: "
                    "make it the same for all"
                )
        state[stacked] = torch.stack([torch.cat([p.detach() for p in own]) for own in networks])
        learns[stacked] = parts[0].requires_grad
    with torch.device("meta"):
        merged = GroupedExperts(
            dim=kind.dim,
            hidden_dim=kind.hidden_dim,
            num_experts=experts.num_experts,
            activation=kind.activation,
            bias=kind.bias,
            hidden_scale=kind.hidden_scale,
            dropout=kind.dropout,
            backend=backend,
        )
    return _filled(merged, state, learns).train(experts.training)


def common_kind(experts: ExpertList) -> ExpertKind:
    """What all networks of a list are.

    Raises:
        InputError: one that is neither ``ExpertNetwork`` nor a SwiGLU ``FeedForward``, or one that
            differs from the first.
    """
    first: ExpertKind | None = None
    for number, network in enumerate(experts.children()):
        kind = _kind_of(network)
        if kind is None:
            raise InputError(
                f"expert {number} is a {type(network).__name__}, which cannot be stacked: an "
                "ExpertNetwork or a SwiGLU FeedForward of nn.Linear can"
            )
        first = first or kind
        for what, value in vars(kind).items():
            wanted = getattr(first, what)
            if _identity(value) != _identity(wanted):
                given, wanted = (getattr(v, "name", v) for v in (value, wanted))
                raise InputError(
                    f"{what} of expert {number} is {given}, but of expert 0 {wanted}: only experts "
                    "of one kind can be stacked"
                )
    assert first is not None  # a list has an expert at least
    return first


def stacked_parts(experts: ExpertList) -> dict[str, list[list[nn.Parameter]]]:
    """Of each parameter of ``GroupedExperts``, by name: the parts, in order, that each expert has.

    Args:
        experts: of one kind (``common_kind``).
    """
    found: dict[str, list[list[nn.Parameter]]] = {}
    for network in experts.children():
        for stacked, names in _part_names(network).items():
            found.setdefault(stacked, []).append([network.get_parameter(name) for name in names])
    return found


def _build(kind: ExpertKind) -> nn.Module:
    plain = not kind.hidden_scale and not kind.dropout
    if not plain or kind.activation != ACTIVATIONS["swiglu"]:
        return ExpertNetwork(**vars(kind))
    return FeedForward(
        gate_proj=nn.Linear(kind.dim, kind.hidden_dim, bias=kind.bias),
        up_proj=nn.Linear(kind.dim, kind.hidden_dim, bias=kind.bias),
        down_proj=nn.Linear(kind.hidden_dim, kind.dim, bias=kind.bias),
    )


def _kind_of(network: nn.Module) -> ExpertKind | None:
    if isinstance(network, ExpertNetwork):
        activation, dropout = network.activation, network.dropout
        scaled = network.hidden_scale is not None
    elif isinstance(network, FeedForward) and isinstance(network.activation, nn.SiLU):
        activation, dropout, scaled = ACTIVATIONS["swiglu"], 0.0, False
    else:
        return None
    layers: list[Any] = [getattr(network, name, None) for name in _layer_names(network)]
    if not all(type(layer) is nn.Linear for layer in layers):
        return None
    biased = {layer.bias is not None for layer in layers}
    if len(biased) > 1:
        return None
    hidden_dim, dim = layers[0].weight.shape
    return ExpertKind(dim, hidden_dim, activation, biased.pop(), scaled, dropout)


def _layer_names(network: nn.Module) -> tuple[str, ...]:
    """Gate (if any), up, down."""
    if isinstance(network, FeedForward):
        return "w1", "w3", "w2"
    names = ("gate_proj", "up_proj", "down_proj")
    return names if getattr(network, "gate_proj", None) is not None else names[1:]


def _part_names(network: nn.Module) -> dict[str, list[str]]:
    """{name in ``GroupedExperts``: names in the network whose rows follow each other there}."""
    *first, down = _layer_names(network)
    up = "gate_up" if len(first) == 2 else "up"
    parts = {f"{up}_proj": [f"{n}.weight" for n in first], "down_proj": [f"{down}.weight"]}
    if network.get_submodule(down).bias is not None:
        parts |= {f"{up}_bias": [f"{n}.bias" for n in first], "down_bias": [f"{down}.bias"]}
    if getattr(network, "hidden_scale", None) is not None:
        parts["hidden_scale"] = ["hidden_scale"]
    return parts


def _filled(module: Any, state: dict[str, Tensor], learns: dict[str, bool]) -> Any:
    module.load_state_dict(state, assign=True)
    for name, learn in learns.items():
        module.get_parameter(name).requires_grad_(learn)
    return module


def _identity(value: Any) -> Any:
    """Two activations made with the same numbers are the same."""
    if isinstance(value, Activation) and isinstance(value.function, functools.partial):
        made = value.function
        return value.name, value.gated, made.func, made.args, tuple(sorted(made.keywords.items()))
    return value
