"""The routed experts' forward and backward, pass by pass; ``ops.routed_experts`` is their operator.

Letters: t tokens · k experts_per_token · a assignments (sorted by expert; dead ones last) ·
e experts · d dim · h hidden_dim of an expert · w = 2h (ungated: h).

Kept for backward are x [t, d] and z [a, w], what the activation sees; with ``recompute_up`` x
alone. What is not kept is either cheap to make again (the copied rows, the activated ones) or not
needed: the gradient of a weight s that multiplies an answer y = W a is

    ∂/∂s = <g, W a> = <Wᵀ g, a>,     g the gradient of the token's sum,

and Wᵀ g is on backward's way anyway. A row of z is read once there: for its own gradient, for the
activated row (which down's gradient needs), for ∂/∂s. Nothing is added by atomics: a token's rows
are added in the order of its choices, an expert's by the grouped product.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import Tensor

from moe_builders.ops.activations import Activation
from moe_builders.ops.grouped_mm import multiply_groups, multiply_transposed
from moe_builders.ops.kernels import row_kernels
from moe_builders.ops.runs import sum_experts, values_of_rows


class Given(NamedTuple):
    """Tensors of ``ops.routed_experts``, by the same names."""

    x: Tensor
    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    hidden_scale: Tensor | None
    num_tokens_per_expert: Tensor
    token_index: Tensor | None
    slot_of: Tensor | None
    input_weights: Tensor | None
    row_weights: Tensor | None
    output_weights: Tensor | None


class How(NamedTuple):
    """Its other arguments."""

    activation: Activation
    recompute_up: bool
    backend: str
    kernels: str


# what may have a gradient
LEARNING = ("x", "up", "down", "up_bias", "down_bias", "hidden_scale", "input_weights",
            "row_weights", "output_weights")  # fmt: skip


def forward_passes(given: Given, how: How) -> tuple[Tensor, Tensor]:
    """The answer [t, d] ([a, d] where x are rows), and z [a, w], or an empty tensor for it."""
    y, z = forward_rows(given, how)
    return add_home(y, given, given.output_weights, how), z


def forward_rows(
    given: Given, how: How, y: Tensor | None = None, z: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Each row's answer [a, d], and z [a, w], or an empty tensor for it.

    Args:
        given, how: of ``forward_passes``.
        y, z: where to write them; None: in new memory.
    """
    ops, counts = row_kernels(given.x, how.kernels), given.num_tokens_per_expert
    z = _pre_activation(_rows(given, how), given, how, z)
    hidden = ops.activate(z, how.activation, given.row_weights)  # [a, h]
    if how.recompute_up:
        z = z.new_empty(0)
    if given.hidden_scale is not None:
        hidden *= values_of_rows(given.hidden_scale, counts, hidden.shape[0])
    y = multiply_groups(hidden, given.down, counts, how.backend, y)  # [a, d]
    del hidden
    if given.down_bias is not None:
        ops.add_expert_rows_(y, given.down_bias, counts, given.row_weights)
    return y, z


def backward_passes(
    grad: Tensor, z: Tensor, given: Given, how: How, wanted: Collection[str]
) -> dict[str, Tensor]:
    """The gradients of those of ``LEARNING`` that are wanted; perhaps of others, too.

    Args:
        grad: of the answer, contiguous.
        z: what ``forward_passes`` gave.
        given, how: as there.
        wanted: names.
    """
    found = backward_rows(grad, z, given, how, wanted)
    if "x" in found:
        found["x"] = add_home(found["x"], given, given.input_weights, how)
    return found


def backward_rows(
    grad: Tensor,
    z: Tensor,
    given: Given,
    how: How,
    wanted: Collection[str],
    out: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """``backward_passes``, but for x: in place of its gradient that of its rows, [a, d].

    Args:
        grad, z, given, how, wanted: as there.
        out: where to write the gradients of up, down and x's rows; those that are missing: in new
            memory.
    """
    out = {} if out is None else out
    ops, counts = row_kernels(given.x, how.kernels), given.num_tokens_per_expert
    found: dict[str, Tensor] = {}
    rows = None  # [a, d] the experts' inputs, copied again where they are needed
    if how.recompute_up:
        rows = _rows(given, how)
        z = _pre_activation(rows, given, how)
    weights = _product(given.row_weights, given.output_weights)  # [a]

    # through the down projection and the activation
    g = grad if given.token_index is None else ops.take_rows(grad, given.token_index)  # [a, d]
    inner = multiply_groups(g, given.down.transpose(1, 2), counts, how.backend)  # [a, h]
    scale = None
    if given.hidden_scale is not None:
        scale = values_of_rows(given.hidden_scale, counts, inner.shape[0])  # [a, h]
    outer = inner if scale is None else inner * scale
    z_grad, hidden, weights_grad = ops.activate_backward(z, outer, how.activation, weights)
    del outer, z
    if scale is not None:
        if "hidden_scale" in wanted:
            found["hidden_scale"] = sum_experts(inner * hidden, counts)
        hidden *= scale
    del inner
    if "down" in wanted:
        found["down"] = multiply_transposed(g, hidden, counts, how.backend, out.get("down"))
    del hidden
    if given.down_bias is not None:
        g = ops.zero_tail_(g.clone() if g is grad else g, counts.sum())
        if weights_grad is not None:
            bias = values_of_rows(given.down_bias, counts, g.shape[0])
            weights_grad += ops.row_products(g, bias)
        if "down_bias" in wanted:
            weighed = g if weights is None else ops.weigh_rows(g, weights)
            found["down_bias"] = sum_experts(weighed, counts)
    del g
    if weights_grad is not None:
        for name, other in (
            ("row_weights", given.output_weights), ("output_weights", given.row_weights)
        ):  # fmt: skip
            found[name] = weights_grad if other is None else weights_grad * other

    # through the up projection
    if "up_bias" in wanted:
        found["up_bias"] = sum_experts(z_grad, counts)
    if "up" in wanted:
        rows = _rows(given, how) if rows is None else rows
        found["up"] = multiply_transposed(z_grad, rows, counts, how.backend, out.get("up"))
    del rows
    if "x" in wanted or "input_weights" in wanted:
        up = given.up.transpose(1, 2)
        rows_grad = multiply_groups(z_grad, up, counts, how.backend, out.get("x"))
        if "input_weights" in wanted and given.token_index is not None:
            products = ops.row_products(rows_grad, ops.take_rows(given.x, given.token_index))
            found["input_weights"] = ops.zero_tail_(products, counts.sum())
        del z_grad
        found["x"] = rows_grad
    return found


def _rows(given: Given, how: How) -> Tensor:
    """[a, d] what the experts see."""
    if given.token_index is None:
        return given.x
    ops = row_kernels(given.x, how.kernels)
    return ops.take_rows(given.x, given.token_index, given.input_weights)


def add_home(rows: Tensor, given: Given, weights: Tensor | None, how: How) -> Tensor:
    """Rows [a, d] added up to tokens [t, d]; as they are where x are rows."""
    ops = row_kernels(given.x, how.kernels)
    if given.token_index is None:
        return rows
    if given.slot_of is None:
        return ops.sum_tokens(rows, given.token_index, given.x.shape[0], weights)
    return ops.sum_slots(rows, given.slot_of, weights)


def _pre_activation(rows: Tensor, given: Given, how: How, z: Tensor | None = None) -> Tensor:
    """z: [a, d] -> [a, w], zero in dead rows."""
    ops, counts = row_kernels(given.x, how.kernels), given.num_tokens_per_expert
    z = multiply_groups(rows, given.up, counts, how.backend, z)  # [a, w]
    if given.up_bias is not None:
        ops.add_expert_rows_(z, given.up_bias, counts)
    return z


def _product(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Of those that are there."""
    if first is None or second is None:
        return second if first is None else first
    return first * second
