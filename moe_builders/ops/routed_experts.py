"""All routed experts of a layer as one operator: copy rows, multiply, activate, multiply, add up.

Letters: t tokens · k experts_per_token · a assignments (sorted by expert; dead ones last) ·
e experts · d dim · h hidden_dim of an expert · w = 2h (ungated: h).

What it computes, pass by pass, is ``ops.routed_passes``; here it is registered with torch, so that
autograd sees one backward (which keeps x and z [a, w] alone) and torch.compile one opaque node in
any dtype. The host reads nothing but where a product's back end does (``ops.grouped_mm``).

The same sums written out: ``gather_rows``, ``GroupedExperts`` on rows, ``combine_rows``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moe_builders.ops.activations import Activation, made_with
from moe_builders.ops.gathered_mm import takes_gathered
from moe_builders.ops.grouped_mm import check_products
from moe_builders.ops.kernels import Kernels
from moe_builders.ops.routed_blocks import backward_blocks, find_blocks, forward_blocks
from moe_builders.ops.routed_passes import LEARNING, Given, How, backward_passes, forward_passes


@dataclass(frozen=True)
class ExpertWeights:
    """What the experts consist of, in the dtype of the rows.

    Attributes:
        up: [e, w, d], gate rows first.
        down: [e, d, h].
        up_bias: [e, w] or None.
        down_bias: [e, d] or None.
        hidden_scale: [e, h] multiplies the activated rows, or None.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    hidden_scale: Tensor | None = None


def routed_experts(
    x: Tensor,
    experts: ExpertWeights,
    num_tokens_per_expert: Tensor,
    *,
    activation: Activation,
    token_index: Tensor | None = None,
    slot_of: Tensor | None = None,
    input_weights: Tensor | None = None,
    row_weights: Tensor | None = None,
    output_weights: Tensor | None = None,
    recompute_up: bool = False,
    backend: str = "auto",
    kernels: Kernels = "auto",
) -> Tensor:
    """Each token's (weighted) sum of its experts' answers, or each row's answer.

    Args:
        x: [t, d]; without ``token_index`` the rows themselves, [a, d].
        experts: their weights.
        num_tokens_per_expert: [e] int.
        activation: one that ``ops.activations.is_named``.
        token_index: [a] int, whose row it is. None: x are rows already, and the answers stay rows.
        slot_of: [t, k] int, where a token's rows stand. None: tokens have any number of rows.
        input_weights: [a] multiply the experts' inputs. None: 1.
        row_weights: [a] multiply between activation and down projection (and the down bias).
            None: 1.
        output_weights: [a] multiply the answers. None: 1.
        recompute_up: keep x only; backward multiplies by ``up`` once more.
        backend: of ``ops.grouped_mm``.
        kernels: of ``ops.kernels``.

    Returns:
        [t, d], zero for a token without live rows; without ``token_index`` [a, d], zero in dead
        rows.

    Raises:
        InputError: see ``ops.grouped_mm`` and ``ops.kernels``.
    """
    given = (slot_of, input_weights, output_weights)
    assert token_index is not None or given == (None, None, None)
    check_products(x, experts.up, num_tokens_per_expert, backend)
    if takes_gathered(backend, x, experts.up):
        backend = "gather"
    answer, _ = _routed_experts(
        x, experts.up, experts.down, experts.up_bias, experts.down_bias, experts.hidden_scale,
        num_tokens_per_expert, token_index, slot_of, input_weights, row_weights, output_weights,
        activation.name, activation.numbers, recompute_up, backend, kernels,
    )  # fmt: skip
    return answer


_SIGNATURE = (
    "(Tensor x, Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias, Tensor? hidden_scale, "
    "Tensor num_tokens_per_expert, Tensor? token_index, Tensor? slot_of, Tensor? input_weights, "
    "Tensor? row_weights, Tensor? output_weights, str activation, float[] numbers, "
    "bool recompute_up, str backend, str kernels"
)


@torch.library.custom_op(
    "moe_builders::routed_experts", mutates_args=(), schema=_SIGNATURE + ") -> (Tensor, Tensor)"
)
def _routed_experts(*arguments: Any) -> tuple[Tensor, Tensor]:
    given, how = _parts(arguments)
    blocks = find_blocks(given, how)
    return forward_blocks(given, how, blocks) if blocks else forward_passes(given, how)


@_routed_experts.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    given, how = _parts(arguments)
    rows = given.x.shape[0] if given.token_index is None else given.token_index.shape[0]
    z = (0,) if how.recompute_up else (rows, given.up.shape[1])
    return given.x.new_empty(given.x.shape), given.x.new_empty(z)


@torch.library.custom_op(
    "moe_builders::routed_experts_backward",
    mutates_args=(),
    schema=_SIGNATURE + ", Tensor grad, Tensor z, str[] wanted) -> Tensor[]",
)
def _routed_experts_backward(*arguments: Any) -> list[Tensor]:
    """The wanted gradients, in the order in which they are wanted."""
    *passed, grad, z, wanted = arguments
    given, how = _parts(passed)
    blocks = find_blocks(given, how)
    if blocks:
        found = backward_blocks(grad, z, given, how, wanted, blocks)
    else:
        found = backward_passes(grad, z, given, how, wanted)
    # sums are wide; a compiled graph takes what it was promised for what it gets
    return [found[name].to(getattr(given, name).dtype) for name in wanted]


@_routed_experts_backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    *passed, _, _, wanted = arguments
    given, _ = _parts(passed)
    tensors = [getattr(given, name) for name in wanted]
    return [tensor.new_empty(tensor.shape) for tensor in tensors]


def _save_for_backward(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, z = output
    ctx.mark_non_differentiable(z)
    ctx.set_materialize_grads(False)  # else backward is given zeros [a, w] for z
    tensors = len(Given._fields)
    ctx.save_for_backward(*inputs[:tensors], z)
    ctx.values = inputs[tensors:]


def _backward(ctx, grad: Tensor | None, _):
    if grad is None:
        return (None,) * (len(Given._fields) + len(ctx.values))
    *tensors, z = ctx.saved_tensors
    wanted = [name for name in LEARNING if ctx.needs_input_grad[Given._fields.index(name)]]
    # a sum's gradient is expanded (stride 0), which kernels refuse
    found = _routed_experts_backward(*tensors, *ctx.values, grad.contiguous(), z, wanted)
    gradients = dict(zip(wanted, found, strict=True))
    return *(gradients.get(name) for name in Given._fields), *(None for _ in ctx.values)


_routed_experts.register_autograd(_backward, setup_context=_save_for_backward)


def _parts(arguments: Sequence[Any]) -> tuple[Given, How]:
    tensors = len(Given._fields)
    name, numbers, *rest = arguments[tensors:]
    return Given(*arguments[:tensors]), How(made_with(name, numbers), *rest)


# torch's FlopCounterMode sees an operator from outside: dead rows are rows like others to it
@register_flop_formula(torch.ops.moe_builders.routed_experts)
def _flops(*shapes: Any, out_shape: Any = None) -> int:
    return sum(_products(shapes))


@register_flop_formula(torch.ops.moe_builders.routed_experts_backward)
def _backward_flops(*shapes: Any, out_shape: Any = None) -> int:
    *passed, _, _, wanted = shapes
    up, down = _products(passed)
    _, how = _parts(passed)
    times = ("up" in wanted) + ("x" in wanted or "input_weights" in wanted) + how.recompute_up
    return times * up + (1 + ("down" in wanted)) * down


def _products(shapes: Sequence[Any]) -> tuple[int, int]:
    """FLOPs of the rows' products with up and with down."""
    given, _ = _parts(shapes)
    rows: Any = given.x if given.token_index is None else given.token_index
    up, down = (2 * rows[0] * shape[1] * shape[2] for shape in (given.up, given.down))
    return up, down
