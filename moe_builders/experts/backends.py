"""What multiplies the routed experts: chosen for a whole model, checked, and told with its reason.

Letters: a rows (assignments) · e experts · d dim · h hidden_dim of an expert · w = 2h (ungated: h).
"""

from collections import Counter
from typing import Any

import torch
from torch import nn

from moe_builders.errors import InputError
from moe_builders.experts.grouped import BACKENDS, GroupedExperts, check_backend
from moe_builders.experts.liger import check_rows, find_liger
from moe_builders.ops.activations import is_named
from moe_builders.ops.gathered_mm import has_kernel
from moe_builders.ops.kernels import why_kernels
from moe_builders.ops.product_ways import Way, way_of_groups, way_of_transposed

CHOICES = tuple(name for name in BACKENDS if name != "gather")  # which has no gradient
_WAYS = {
    "grouped": "torch's grouped product",
    "loop": "a loop over experts",
    "rounded": "a loop over experts with rounded numbers of rows",
    "bmm": "one batched product of padded rows",
    "gather": "copied matrices",
}
_ROWS = 64  # any number: how a product goes does not depend on it


def set_backend(
    model: nn.Module,
    *,
    backend: str = "auto",
    recompute_up: bool = False,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Give all ``GroupedExperts`` of a model a back end, and let them keep less for backward.

    Args:
        model: with such experts, also on the meta device.
        backend: one of ``CHOICES``; "auto" leaves each as it was built.
        recompute_up: of ``GroupedExperts``; False leaves each as it was built.
        device, dtype: that will compute, for what Liger needs; None: looked at in forward.

    Raises:
        InputError: no such experts in the model, a back end that some cannot take, or
            ``recompute_up`` for an activation of one's own.
    """
    if backend == "auto" and not recompute_up:
        return
    wanted = f"expert_backend={backend}" if backend != "auto" else "recompute_up=true"
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, GroupedExperts)]
    if not found:
        raise InputError(f"{wanted} is for GroupedExperts, but the model has none: leave it out")
    if backend == "liger":
        find_liger()
        if device is not None and dtype is not None:
            check_rows(device, dtype)
    for name, experts in found:
        if recompute_up and not is_named(experts.activation):
            raise InputError(
                f"recompute_up=true is for the package's activations, but {name} has one of your "
                f"own, {experts.activation.name!r}: leave recompute_up out"
            )
        experts.recompute_up = recompute_up or experts.recompute_up
        experts.backend = experts.backend if backend == "auto" else backend
        check_backend(experts)


def product_ways(
    experts: GroupedExperts, *, device: torch.device, dtype: torch.dtype
) -> dict[str, Way]:
    """How each product of a forward and a backward goes, by name; rows and weights lie dense.

    Args:
        experts: also on the meta device; not of the back end "liger".
        device, dtype: that compute.

    Raises:
        InputError: see ``ops.product_ways``.
    """

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    d, h, backend = experts.dim, experts.hidden_dim, experts.backend
    width = 2 * h if experts.activation.gated else h
    x, z, hidden = empty(_ROWS, d), empty(_ROWS, width), empty(_ROWS, h)  # [a, d], [a, w], [a, h]
    up, down = empty(2, width, d), empty(2, d, h)  # [e, w, d], [e, d, h]
    ways = {
        "up": way_of_groups(backend, x, up, device=device),
        "down": way_of_groups(backend, hidden, down, device=device),
        "gradient of hidden": way_of_groups(backend, x, down.transpose(1, 2), device=device),
        "gradient of down": way_of_transposed(backend, x, hidden, device=device),
        "gradient of up": way_of_transposed(backend, z, x, device=device),
        "gradient of x": way_of_groups(backend, z, up.transpose(1, 2), device=device),
    }
    if experts.recompute_up and is_named(experts.activation):
        ways["up again"] = ways["up"]
    return ways


def describe_backend(experts: Any, *, device: torch.device, dtype: torch.dtype) -> str:
    """How a layer's experts are computed in training and why, in a line.

    Args:
        experts: of any kind, also on the meta device.
        device, dtype: that compute.

    Raises:
        InputError: see ``product_ways``.
    """
    if not isinstance(experts, GroupedExperts):
        return f"experts compute as their class {type(experts).__name__} does"
    if experts.backend == "liger":
        return "experts by Liger's fused kernels (the back end is liger)"
    ways = product_ways(experts, device=device, dtype=dtype)
    times = Counter(way.name for way in ways.values())
    parts = []
    for name, number in times.most_common():
        reasons = dict.fromkeys(way.reason for way in ways.values() if way.name == name)
        if name == "grouped":
            reasons[_grouped(device, dtype)] = None
        share = "" if len(times) == 1 else f"{number} of {len(ways)} by "
        parts.append(f"{share}{_WAYS[name]} ({'; '.join(reasons)})")
    return f"experts' products: {', '.join(parts)}; {_rows(experts, device, dtype)}"


def _grouped(device: torch.device, dtype: torch.dtype) -> str:
    """What torch's grouped product is there."""
    if device.type != "cuda":
        return "on a CPU a loop inside torch"
    if has_kernel(dtype, device):
        return "one kernel on this GPU"
    return "on this GPU a loop inside torch that waits for the counts"


def _rows(experts: GroupedExperts, device: torch.device, dtype: torch.dtype) -> str:
    if not is_named(experts.activation):
        return (
            "rows are copied and summed apart, each step with autograd's gradient (the activation "
            f"{experts.activation.name!r} is your own)"
        )
    name, reason = why_kernels(dtype, device)
    told = f"rows by {'Triton' if name == 'triton' else 'plain torch'} ({reason})"
    if experts.dropout:
        return f"{told}, copied and summed apart (dropout is {experts.dropout:g})"
    return told
