"""Experts as separate modules: whatever networks one likes, and the plain one of this package.

Letters: a rows (assignments sorted by expert) · d dim · h hidden_dim of an expert.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_builders.errors import InputError
from moe_builders.ops.activations import Activation, find_activation


class ExpertNetwork(nn.Module):
    """One feed-forward network with any activation of ``ops.activations``.

    What one expert of ``GroupedExperts`` computes, as ``nn.Linear`` layers under Hugging Face's
    names: ``gate_proj`` (of a gated activation), ``up_proj``, ``down_proj``.

    Args:
        dim: d.
        hidden_dim: h.
        activation: a name from ``ops.activations`` or an ``Activation``.
        bias: the layers have biases.
        hidden_scale: a parameter of that name, [h] of ones, multiplies the activated rows.
        dropout: of the answer, in training.

    Raises:
        InputError: a number below 1, an unknown activation, or a dropout outside [0, 1).
    """

    def __init__(
        self,
        *,
        dim: int,
        hidden_dim: int,
        activation: str | Activation = "swiglu",
        bias: bool = False,
        hidden_scale: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if min(dim, hidden_dim) < 1:
            raise InputError(f"dim ({dim}) and hidden_dim ({hidden_dim}) must be at least 1")
        if not 0 <= dropout < 1:
            raise InputError(f"dropout is {dropout}, but must be at least 0 and below 1")
        self.activation, self.dropout = find_activation(activation), dropout
        gated = self.activation.gated
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=bias) if gated else None
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)
        for layer in (self.gate_proj, self.up_proj, self.down_proj):
            if layer is not None and layer.bias is not None:
                nn.init.zeros_(layer.bias)  # as in GroupedExperts
        self.hidden_scale = nn.Parameter(torch.ones(hidden_dim)) if hidden_scale else None

    def forward(self, x: Tensor) -> Tensor:
        """[.., d] -> [.., d]."""
        z = self.up_proj(x)  # [.., h]
        if self.gate_proj is not None:
            z = torch.cat((self.gate_proj(x), z), dim=-1)  # [.., 2h]
        hidden = self.activation.function(z)  # [.., h]
        if self.hidden_scale is not None:
            hidden = hidden * self.hidden_scale
        y = self.down_proj(hidden)  # [.., d]
        return F.dropout(y, self.dropout, self.training) if self.dropout else y


class ExpertList(nn.Module):
    """Separate networks in the place of ``GroupedExperts``; expert j is called str(j).

    They may differ from each other in kind and size; FLOPs and active parameters are then counted
    as if a token met the mean expert. A network without a row gets zero gradients (not None) for
    all of its parameters, so that an optimizer treats all alike and no process of several leaves
    a collective out.

    One product after another, and the numbers of rows are read on the host: for networks that
    cannot be stacked, and for looking at one expert. ``experts.stacking`` stacks those that can.

    Args:
        experts: modules [n, d] -> [n, d].

    Raises:
        InputError: no experts, something that is no module, or one module twice.
    """

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        super().__init__()
        if not experts:
            raise InputError("the list of experts is empty, but must have at least 1")
        first: dict[int, int] = {}
        for number, expert in enumerate(experts):
            if not isinstance(expert, nn.Module):
                raise InputError(
                    f"expert {number} is a {type(expert).__name__}, but must be an nn.Module"
                )
            before = first.setdefault(id(expert), number)
            if before != number:
                raise InputError(
                    f"experts {before} and {number} are the same module: give each its own"
                )
            self.add_module(str(number), expert)
        self.num_experts = len(first)

    def forward(
        self, x: Tensor, num_tokens_per_expert: Tensor, row_weights: Tensor | None = None
    ) -> Tensor:
        """Apply each expert to its rows.

        Args:
            x: [a, d] rows sorted by expert; rows past the counts are dead and may hold anything.
            num_tokens_per_expert: [e] int; read on the host.
            row_weights: [a] multiplies each expert's answers.

        Returns:
            [a, d], zero in dead rows.

        Raises:
            InputError: counts of another number of experts, or an expert whose answers are not of
                its rows' shape.
        """
        if num_tokens_per_expert.shape != (self.num_experts,):
            raise InputError(
                f"num_tokens_per_expert has shape {tuple(num_tokens_per_expert.shape)}, but there "
                f"are {self.num_experts} experts"
            )
        answers, idle, start = [], [], 0
        for expert, rows in zip(self.children(), num_tokens_per_expert.tolist(), strict=True):
            if rows == 0:
                idle += [p for p in expert.parameters() if p.requires_grad]
                continue
            given = x[start : start + rows]  # [n, d]
            answer = expert(given)
            if answer.shape != given.shape:
                raise InputError(
                    f"a {type(expert).__name__} in the list of experts gave {tuple(answer.shape)} "
                    f"for rows {tuple(given.shape)}: an expert's answers have its rows' shape"
                )
            answers.append(answer.to(x.dtype))
            start += rows
        dead = x.new_zeros(x.shape[0] - start, x.shape[1])
        if idle and torch.is_grad_enabled():
            dead = _GiveZeros.apply(dead, *idle)
        # no rows of x: it gets its gradient (which a sharded layer waits for) also from no answer
        y = torch.cat([*answers, x[:0], dead])  # [a, d]
        if row_weights is not None:
            live = torch.arange(x.shape[0], device=x.device) < start  # [a]
            y = y * torch.where(live, row_weights, 0)[:, None].to(y.dtype)
        return y


class _GiveZeros(torch.autograd.Function):
    """Dead rows as they are; parameters that had no part in the others get zeros for a gradient."""

    @staticmethod
    def forward(ctx, dead: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return dead.view_as(dead)

    @staticmethod
    def backward(ctx, grad: Tensor):
        zeros = [torch.zeros(shape, dtype=dtype, device=on) for shape, dtype, on in ctx.like]
        return None, *zeros
