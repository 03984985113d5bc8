"""Which parameters learn, and with which of the optimizer's arguments: rules over their names.

Names are those of ``model.named_parameters()``, the same before and after sharding. A rule's regex
is *searched* in them: ``router`` is found in ``layers.0.mlp.router.gate.weight``.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from moe_builders.errors import InputError
from moe_builders.routing import is_router_parameter

MATRICES = "matrices"
SMALL = "norms, biases, router"
_SHOWN = 3  # names in a message


def is_small(name: str, parameter: Tensor) -> bool:
    """A norm's weight, a bias (also one per expert) or a router's: never decayed, never quantised.

    Decay would pull a norm's scale (or experts' ``hidden_scale``) towards 0 and a router towards
    indifference.
    """
    small = name.endswith(("bias", "hidden_scale"))
    return parameter.ndim < 2 or small or is_router_parameter(name)


def freeze(model: nn.Module, patterns: Sequence[str], *, freeze_router: bool = False) -> None:
    """Take the gradient from every parameter whose name a pattern is found in.

    Before the model is sharded: groups of parameters that are gathered together then know which
    of them need no reduction. What stands before a frozen router still learns from the balancing
    loss, whose gradient passes through.

    Args:
        model: on the meta device or real.
        patterns: regexes; each must be found in some name.
        freeze_router: freeze the routers of all layers.

    Raises:
        InputError: a pattern that is found nowhere, no router, or nothing left to learn.
    """
    named = dict(model.named_parameters())
    frozen = set()
    for number, pattern in enumerate(patterns):
        found = _search(pattern, named, path=f"freeze[{number}]")
        if not found:
            raise InputError(f"freeze[{number}] {_found_nowhere(pattern, named)}")
        frozen |= found
    if freeze_router:
        routers = {name for name in named if is_router_parameter(name)}
        if not routers:
            raise InputError(
                "freeze_router is true, but no layer has a module named router with parameters: "
                "freeze by name (freeze)"
            )
        frozen |= routers
    if frozen.issuperset(name for name, p in named.items() if p.requires_grad):
        raise InputError(
            f"freeze and freeze_router freeze all {len(named)} parameters: leave some to learn"
        )
    for name in frozen:
        named[name].requires_grad_(False)


def group_parameters(
    model: nn.Module,
    rules: Sequence[Mapping[str, Any]],
    *,
    small_defaults: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Parameters that take a gradient, in the groups that an optimizer's constructor takes.

    A parameter follows the first rule whose ``match`` is found in its name. Within a rule (and
    among those without one) norms, biases and routers are a group of their own, which also gets
    ``small_defaults`` where the rule says nothing else. Groups without parameters are left out;
    the order is that of the rules after the parameters without one, and inside a group the
    model's: the same on every process and in every run.

    Args:
        model: gives names and parameters.
        rules: {"match": regex, argument: value, ...}.
        small_defaults: arguments of norms, biases and routers, as {"weight_decay": 0.0}.

    Returns:
        Groups with ``params``, ``name`` and their own arguments.

    Raises:
        InputError: a rule without match, or whose regex is found in no name that an earlier rule
            has left.
    """
    rest = {name: p for name, p in model.named_parameters() if p.requires_grad}
    taken: list[tuple[str, dict[str, Any], dict[str, Tensor]]] = []
    for number, rule in enumerate(rules):
        path = f"param_groups[{number}]"
        pattern = rule.get("match") if isinstance(rule, Mapping) else None
        if not isinstance(pattern, str):
            raise InputError(
                f"{path} is {rule!r}, but must be match: <regex of names> with arguments of the "
                "optimizer"
            )
        found = _search(pattern, rest, path=f"{path}.match")
        if not found:
            raise InputError(f"{path}.match {_why_nothing(pattern, model)}")
        arguments = {key: value for key, value in rule.items() if key != "match"}
        taken.append((f"{pattern}: ", arguments, {n: p for n, p in rest.items() if n in found}))
        rest = {name: p for name, p in rest.items() if name not in found}
    groups = []
    for prefix, arguments, named in [("", {}, rest), *taken]:
        small = {name: p for name, p in named.items() if is_small(name, p)}
        large = [p for name, p in named.items() if name not in small]
        if large:
            groups.append({"params": large, "name": prefix + MATRICES} | arguments)
        if small:
            own = {"params": list(small.values()), "name": prefix + SMALL}
            groups.append(own | dict(small_defaults) | arguments)
    return groups


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """The rates to log: ``lr`` of the first group, ``lr/<match>`` of rules with one of their own.

    They are read at once: torch's schedulers write into a rate that is a tensor.
    """
    first, *others = optimizer.param_groups
    rates = {"lr": float(first["lr"])}
    for group in others:
        if _start(group) != _start(first):  # not as they are now: a warm-up begins at 0 for all
            rates[f"lr/{group['name'].rpartition(': ')[0]}"] = float(group["lr"])
    return rates


def _start(group: Mapping[str, Any]) -> float:
    return float(group.get("initial_lr", group["lr"]))


def _search(pattern: str, names: Iterable[str], *, path: str) -> set[str]:
    try:
        return {name for name in names if re.search(pattern, name)}
    except (re.error, TypeError) as error:  # a list in place of a text
        raise InputError(f"{path} is {pattern!r}, which is no regex: {error}") from error


def _why_nothing(pattern: str, model: nn.Module) -> str:
    """Nothing of that name at all, or nothing that is left."""
    named = dict(model.named_parameters())
    found = _search(pattern, named, path="match")
    if not found:
        return _found_nowhere(pattern, named)
    if not any(named[name].requires_grad for name in found):
        return f"{pattern!r} is found only in names of frozen parameters ({_shown(found)})"
    return f"{pattern!r} is found only in names that an earlier rule takes ({_shown(found)})"


def _found_nowhere(pattern: str, names: Iterable[str]) -> str:
    """The pattern, and names that are near it, or some to show what they look like."""
    names = list(names)
    parts = {part for name in names for part in name.split(".")}
    meant: set[str] = set()
    for word in re.findall(r"[A-Za-z_]{3,}", pattern):
        meant.update(difflib.get_close_matches(word, parts, n=1))
    near = [name for name in names if not meant.isdisjoint(name.split("."))]
    return (
        f"{pattern!r} is found in no parameter's name "
        f"({'near are' if near else 'names look like'}: {_shown(near or names)})"
    )


def _shown(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
