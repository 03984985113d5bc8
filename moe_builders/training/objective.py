"""The router part of a step's loss: per layer, then the mean over layers.

Letters: t tokens · l layers with experts · e num_experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import cast, get_args

import torch
from torch import Tensor, nn

from moe_builders.counts import Counted, count_assignments, count_kept
from moe_builders.errors import InputError
from moe_builders.losses import (
    Scope,
    load_balancing_loss,
    mse_balancing_loss,
    pooled_load_balancing_loss,
    router_own_loss,
    router_z_loss,
    score_sums,
)
from moe_builders.routing import Routing

FORMS = ("switch", "mse", "st_moe", "hf")


def narrow_to(routings: Mapping[str, Routing], mask: Tensor) -> dict[str, Routing]:
    """The same decisions, seen only by the tokens in mask [t] (labelled ones, for instance)."""
    return {
        name: replace(routing, info=replace(routing.info, mask=mask))
        for name, routing in routings.items()
    }


def layer_counts(routings: Mapping[str, Routing]) -> Tensor:
    """[l, e] int64, assignments per layer and expert of the tokens in each routing's mask.

    Before any choice was dropped: what the balancing loss counts.

    Raises:
        InputError: no layer with experts, or layers with different numbers of them.
    """
    return _table(routings, count_assignments)


def layer_loads(routings: Mapping[str, Routing]) -> Tensor:
    """[3, l, e] fp64 over the tokens in each routing's mask: assigned, kept, sum of the scores.

    Tables of micro-batches and processes add up. Scores of a real token sum to 1, so that a row of
    the third table sums to the number of tokens. No gradient.

    Raises:
        InputError: no layer with experts, or layers with different numbers of them.
    """
    assigned, kept = layer_counts(routings), _table(routings, count_kept)
    scores = _table(routings, lambda routing: score_sums(routing, torch.float64).detach())
    return torch.stack([assigned.double(), kept.double(), scores])


def router_losses(
    routings: Mapping[str, Routing],
    *,
    scope: str,
    num_tokens: Tensor | int,
    counts: Tensor | None = None,
    form: str = "switch",
    on: str = "assigned",
) -> dict[str, Tensor]:
    """Scalars "balance", "z" and "own", each a sum over tokens / num_tokens, without coefficient.

    Each is the mean over layers; "own" over those layers whose router asks for a loss of its own
    (0 where none does), and "balance" of form "hf" is over all layers at once.

    Args:
        routings: of one micro-batch, from ``collect_routing``.
        form: "switch", "mse", "st_moe" or "hf": ``load_balancing_loss``, ``mse_balancing_loss``,
            the first with first choices only, ``pooled_load_balancing_loss``.
        on: "assigned" or "kept": what is counted.
        scope: "sequence", "micro" or "global".
        num_tokens: real tokens of the whole step over all processes.
        counts: [l, e] of the whole scope, with scope "global" only.

    Raises:
        InputError: an unknown word, or words that do not go together.
    """
    if form not in FORMS:
        raise InputError(f"form {form!r} is not one of {', '.join(FORMS)}")
    check_form(form=form, on=on, scope=scope)
    layers = list(routings.values())
    z = [router_z_loss(routing, num_tokens=num_tokens) for routing in layers]
    own = [router_own_loss(r, num_tokens=num_tokens) for r in layers if r.own_loss is not None]
    counted, over = cast(Counted, on), cast(Scope, scope)  # checked above
    if form == "hf":
        balance = pooled_load_balancing_loss(layers, on=counted, num_tokens=num_tokens)
    elif form == "mse":
        balance = _mean([mse_balancing_loss(r, scope=over, num_tokens=num_tokens) for r in layers])
    else:
        balance = _mean(
            [
                load_balancing_loss(
                    routing,
                    scope=over,
                    counts=None if counts is None else counts[layer],
                    num_tokens=num_tokens,
                    on=counted,
                    choices="first" if form == "st_moe" else "all",
                )
                for layer, routing in enumerate(layers)
            ]
        )
    return {"balance": balance, "z": _mean(z), "own": _mean(own or [z[0].new_zeros(())])}


def check_form(*, form: str, on: str, scope: str) -> None:
    """Refuse a form of the balancing loss that does not exist on these counts or in this scope.

    Raises:
        InputError: which word must change, and to what.
    """
    for name, word, known in (("scope", scope, get_args(Scope)), ("on", on, get_args(Counted))):
        if word not in known:
            raise InputError(f"{name} {word!r} is not one of {', '.join(known)}")
    start = f"router_losses.load_balancing_form is {form}"
    if scope == "global" and (form != "switch" or on != "assigned"):
        raise InputError(
            f"{start} on {on}, but router_losses.load_balancing_scope is global, which knows "
            "load_balancing_form=switch with load_balancing_on=assigned only"
        )
    if form == "hf" and scope != "micro":
        raise InputError(
            f"{start}, but router_losses.load_balancing_scope is {scope}: this form is over the "
            "micro-batch as it is, so set router_losses.load_balancing_scope=micro"
        )
    if form == "mse" and on != "assigned":
        raise InputError(
            f"{start}, but router_losses.load_balancing_on is {on}: this form counts nothing, so "
            "leave router_losses.load_balancing_on=assigned"
        )


def check_balancing(model: nn.Module, *, load_balancing_coef: float) -> None:
    """Refuse a balancing loss on routers that balance by themselves: the two would fight.

    Args:
        model: its modules' ``router`` are asked for ``balances_itself``.
        load_balancing_coef: of the recipe; 0 is always fine.

    Raises:
        InputError: the router and both remedies.
    """
    if load_balancing_coef == 0:
        return
    for name, module in model.named_modules():
        router = getattr(module, "router", None)
        if getattr(router, "balances_itself", False):
            raise InputError(
                f"router_losses.load_balancing_coef is {load_balancing_coef}, but {name}.router is "
                f"a {type(router).__name__}, which balances by itself: set "
                "router_losses.load_balancing_coef=0, or choose another router"
            )


def _table(routings: Mapping[str, Routing], row: Callable[[Routing], Tensor]) -> Tensor:
    """[l, e], a row a layer."""
    if not routings:
        raise InputError(
            "the model has no MoE layer, so there is no routing to count or to train: name a model "
            "or base_model with experts"
        )
    rows = [row(routing) for routing in routings.values()]
    if len({len(r) for r in rows}) > 1:
        raise InputError("layers have different numbers of experts, so their loads make no table")
    return torch.stack(rows)


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()
