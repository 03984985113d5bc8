"""A model's mixture of experts told before training: sizes, costs, how it routes.

Letters: e num_experts · k experts_per_token · d dim · h hidden_dim of an expert.
"""

import re
from typing import Any

import torch
from torch import nn

from moe_builders.errors import InputError
from moe_builders.experts.backends import describe_backend
from moe_builders.flops import count_parameters, experts_per_token, model_flops
from moe_builders.moe import MoE, moe_layers
from moe_builders.moe_size import MoESize
from moe_builders.routers.capacity import Capacity

_HEADER = (
    "layers", "router", "experts", "per token", "hidden", "shared", "limit (train / eval)",
    "causal in training", "causal in evaluation",
)  # fmt: skip


def layer_size(moe: MoE) -> MoESize:
    """The size of a layer in plain numbers.

    Raises:
        InputError: experts or a router of one's own that do not tell their numbers.
    """
    experts: Any = moe.experts
    if not _tells_size(experts):
        raise InputError(
            f"the experts {type(experts).__name__} do not tell their size: give them "
            "attributes dim, hidden_dim and activation"
        )
    dim = getattr(getattr(moe.router, "gate", None), "in_features", experts.dim)
    return MoESize(
        dim=dim,
        hidden_dim=experts.hidden_dim,
        num_experts=moe.router.num_experts,
        experts_per_token=experts_per_token(moe.router),
        gated=experts.activation.gated,
        bias=any(name.endswith("bias") for name, _ in experts.named_parameters()),
        strategy=strategy_of(moe.router),
        latent_dim=None if moe.latent_down is None else experts.dim,
    )


def strategy_of(router: Any) -> str:
    """The router's idea in a word: top_k, sinkhorn, hash, ...; from the name of its class."""
    bare = type(router).__name__.removeprefix("FSDP").removesuffix("Router").removesuffix("TopK")
    if bare == "TokenChoice":
        return "top_k"
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", bare).lower()


def architecture_table(model: nn.Module) -> str:
    """A decoder's layers, a line for each run of equal ones, and what the model holds and costs.

    Also on the meta device. A limit (``Capacity``) is given in times the mean load.

    Raises:
        InputError: a part whose cost nobody knows, see ``model_flops``.
    """
    lines = [_HEADER, *_merged([(name, _cells(mlp)) for name, mlp in _mlps(model)])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    counts, flops = count_parameters(model), model_flops(model)
    text += [
        "",
        f"{counts.total:,} parameters, {counts.active:,} of them active "
        f"({100 * counts.active / counts.total:.1f} %)",
        f"{flops.per_token:,.0f} FLOPs a token in a forward, and {flops.per_pair:,.0f} for each "
        "token that it attends to",
    ]
    told = [moe for _, moe in _moe_layers(model) if _tells_size(moe.experts)]
    text += dict.fromkeys(_told(layer_size(moe), moe.experts) for moe in told)
    return "\n".join([*text, *(f"note: {note}" for note in describe_routing(model))])


def describe_routing(model: nn.Module) -> list[str]:
    """What is worth knowing of a model's routers before it is trained, a sentence each.

    Routers that see later tokens, limits that drop, routers that a balancing loss would fight.
    """
    found = [(name, tuple(_notes(moe))) for name, moe in _moe_layers(model)]
    return [f"{where}: {note}" for where, *notes in _merged(found) for note in notes]


def describe_experts(model: nn.Module, *, device: torch.device, dtype: torch.dtype) -> list[str]:
    """How each layer's experts are computed in training, and why, a sentence for equal neighbours.

    Args:
        model: a decoder, also on the meta device.
        device, dtype: that compute.

    Raises:
        InputError: a back end that cannot, see ``experts.backends``.
    """
    found = [
        (name, (describe_backend(moe.experts, device=device, dtype=dtype),))
        for name, moe in _moe_layers(model)
    ]
    return [f"{where}: {told}" for where, told in _merged(found)]


def is_causal(moe: MoE, *, training: bool) -> bool | None:
    """Whether a token's routing depends on itself and earlier ones only; None: not told.

    A limit of tokens per expert keeps that only where earlier tokens take their slots first.
    """
    if moe.capacity is not None and not moe.capacity.causal(training=training):
        return False
    router: Any = moe.router
    if not isinstance(router, nn.Module):
        return getattr(router, "causal", None)
    before = router.training
    router.training = training  # its own switch alone: train() may refuse, and a copy FSDP refuses
    try:
        return getattr(router, "causal", None)
    finally:
        router.training = before


def _notes(moe: MoE) -> list[str]:
    kind, strategy = type(moe.router).__name__, strategy_of(moe.router)
    notes = []
    causal = {training: is_causal(moe, training=training) for training in (True, False)}
    if None in causal.values():
        notes.append(f"{kind} does not tell whether it is causal (an attribute causal)")
    elif not causal[True] and causal[False]:
        notes.append(
            "training routes a token by later ones too, evaluation and generation do not: the two "
            "differ"
        )
    elif not causal[False]:
        notes.append(
            "evaluation, too, routes a token by later ones: generation, which has none, differs"
        )
    if strategy == "sinkhorn":
        notes.append("Sinkhorn in training only: evaluation takes the best softmax scores")
    for training, mode in ((True, "training"), (False, "evaluation")):
        limit = _limit(moe, training=training)
        if limit is not None:
            notes.append(
                f"{mode} drops what an expert gets above {limit[0]:g} times the mean load "
                f"(by {limit[1]}); a dropped token has the residual alone"
            )
    if getattr(moe.router, "balances_itself", False):
        notes.append(f"{kind} balances by itself: a balancing loss would fight it")
    return notes


def _limit(moe: MoE, *, training: bool) -> tuple[float, str] | None:
    """A mode's tightest limit in times the mean load, and its drop policy; None: there is none.

    A router may have a ``Capacity`` of its own besides the layer's.
    """
    limits = []
    for capacity in (moe.capacity, getattr(moe.router, "capacity", None)):
        if isinstance(capacity, Capacity):
            factor = capacity.factor if training else capacity.eval_factor
            choices = 1 if capacity.share_of == "choices" else experts_per_token(moe.router)
            if factor is not None:
                limits.append((factor / choices, str(capacity.drop)))
    return min(limits, default=None)


def _mlps(model: Any) -> list[tuple[str, nn.Module]]:
    """What stands in each layer's mlp slot; the MoE inside it where there is one."""
    found = []
    for number, layer in enumerate(model.layers):
        inside = list(moe_layers(layer))
        at = f"layers.{number}"
        if not inside:
            found.append((at, layer.mlp))
        for name, moe in inside:
            deeper = name.removeprefix("mlp").removeprefix(".")
            found.append((f"{at}.{deeper}" if deeper else at, moe))
    return found


def _moe_layers(model: nn.Module) -> list[tuple[str, MoE]]:
    return [(name, mlp) for name, mlp in _mlps(model) if isinstance(mlp, MoE)]


def _cells(mlp: nn.Module) -> tuple[str, ...]:
    if not isinstance(mlp, MoE):
        return ("dense", "", "", _width(mlp), "", "", "", "")
    limits = [_limit(mlp, training=training) for training in (True, False)]
    told = [is_causal(mlp, training=training) for training in (True, False)]
    return (
        strategy_of(mlp.router),
        str(mlp.router.num_experts),
        f"{experts_per_token(mlp.router):g}",
        _width(mlp.experts),
        "" if mlp.shared_experts is None else _width(mlp.shared_experts),
        "" if limits == [None, None] else " / ".join(_factor(limit) for limit in limits),
        *("not told" if causal is None else "yes" if causal else "no" for causal in told),
    )


def _factor(limit: tuple[float, str] | None) -> str:
    return "none" if limit is None else f"{limit[0]:g}"


def _told(size: MoESize, experts: nn.Module) -> str:
    """A layer's name and costs in a line."""
    held = sum(p.numel() for p in experts.parameters())
    saved = size.reduction()
    return (
        f"{size.name}: {held // max(size.num_experts or 1, 1):,} parameters an expert, "
        f"{size.flops_per_token:,.0f} FLOPs a token for router and experts, "
        f"{100 * abs(saved):.1f} % {'below' if saved >= 0 else 'above'} a dense network of width "
        f"{4 * size.dim}"
    )


def _tells_size(experts: Any) -> bool:
    return all(hasattr(experts, key) for key in ("dim", "hidden_dim", "activation"))


def _width(network: Any) -> str:
    """Of a feed-forward network; its class where it does not look like one."""
    if hasattr(network, "hidden_dim"):
        return str(network.hidden_dim)
    first = getattr(network, "w1", None)
    return type(network).__name__ if first is None else str(first.weight.shape[0])


def _merged(rows: list[tuple[str, tuple[str, ...]]]) -> list[tuple[str, ...]]:
    """Neighbours that say the same become one row, "first … last"."""
    runs: list[tuple[list[str], tuple[str, ...]]] = []
    for name, cells in rows:
        if runs and runs[-1][1] == cells:
            runs[-1][0].append(name)
        else:
            runs.append(([name], cells))
    return [(names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}", *cells)
            for names, cells in runs]  # fmt: skip
