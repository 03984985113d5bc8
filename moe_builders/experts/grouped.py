"""All routed experts of a layer in two (or three) batched tensors; they know nothing of routing.

Letters: a rows (assignments sorted by expert) · e num_experts · d dim · h hidden_dim of an expert.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_builders.dispatch import Assigned
from moe_builders.errors import InputError
from moe_builders.experts.liger import find_liger, liger_experts
from moe_builders.ops.activations import Activation, find_activation, is_named
from moe_builders.ops.grouped_mm import grouped_mm
from moe_builders.ops.product_ways import BACKENDS as PRODUCTS
from moe_builders.ops.routed_experts import ExpertWeights, routed_experts
from moe_builders.ops.runs import members, values_of_rows

BACKENDS = (*PRODUCTS, "liger")


class GroupedExperts(nn.Module):
    """e feed-forward networks as batched parameters, each applied to its own run of rows.

    Weights are stored as ``nn.Linear`` stores them, so Hugging Face experts stack into them
    without a transpose: ``gate_up_proj`` [e, 2h, d] (gate rows first; ``up_proj`` [e, h, d] for an
    ungated activation) and ``down_proj`` [e, d, h].

    An expert without a row gets a zero gradient (not None), so weight decay and momentum treat
    all experts alike. Its weights are not read: without gradients nothing of it is, so that it
    costs nothing and may hold anything (with gradients, its biases meet zeros in a product).

    Weights stored wider than the rows are cast to the rows' dtype.

    All of it is one operator, ``ops.routed_experts``, which keeps little for backward; with an
    activation of one's own it is written out, product by product.

    Args:
        dim: d.
        hidden_dim: h.
        num_experts: e.
        activation: a name from ``ops.activations`` or an ``Activation``.
        bias: add ``*_bias`` parameters, [e, 2h] and [e, d].
        backend: of ``ops.grouped_mm``: "auto", "grouped", "loop", "bmm" or "gather"; or "liger"
            (``experts.liger``: SwiGLU alone, token choice, a GPU; not run by us yet).
        hidden_scale: add a parameter of that name, [e, h] of ones, which multiplies the activated
            rows (ST-MoE's multiplicative bias, Zoph et al. 2022 (2202.08906)).
        dropout: the share of the answers' elements that are set to zero in training; the rest
            grows by 1 / (1 - dropout).
        recompute_up: keep the rows alone for backward, which then multiplies by the first
            projection once more: 2h numbers a row less for two ninths more of the layer's products.

    Attributes:
        part: what a parameter is to a product: itself; under expert parallelism the experts that
            are here, whose counts ``forward`` then takes.

    Raises:
        InputError: a number below 1, an unknown activation or back end, a dropout outside
            [0, 1), or something that "liger" does not have.
    """

    def __init__(
        self,
        *,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        activation: str | Activation = "swiglu",
        bias: bool = False,
        backend: str = "auto",
        hidden_scale: bool = False,
        dropout: float = 0.0,
        recompute_up: bool = False,
    ) -> None:
        super().__init__()
        if min(dim, hidden_dim, num_experts) < 1:
            raise InputError(
                f"dim ({dim}), hidden_dim ({hidden_dim}) and num_experts ({num_experts}) must be "
                "at least 1"
            )
        if not 0 <= dropout < 1:
            raise InputError(f"dropout is {dropout}, but must be at least 0 and below 1")
        self.dim, self.hidden_dim, self.num_experts = dim, hidden_dim, num_experts
        self.activation = find_activation(activation)
        self.backend, self.dropout, self.recompute_up = backend, dropout, recompute_up
        self.part: Callable[[Tensor], Tensor] = _itself
        up_name, up_width = (
            ("gate_up", 2 * hidden_dim) if self.activation.gated else ("up", hidden_dim)
        )
        self._up_name = up_name
        self.register_parameter(
            f"{up_name}_proj", nn.Parameter(torch.empty(num_experts, up_width, dim))
        )
        self.down_proj = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        up_bias = nn.Parameter(torch.empty(num_experts, up_width)) if bias else None
        self.register_parameter(f"{up_name}_bias", up_bias)
        self.down_bias = nn.Parameter(torch.empty(num_experts, dim)) if bias else None
        scale_shape = (num_experts, hidden_dim)
        self.hidden_scale = nn.Parameter(torch.empty(scale_shape)) if hidden_scale else None
        check_backend(self)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within ±1/√fan_in, as ``nn.Linear``; biases zero, ``hidden_scale`` one."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
                elif name == "hidden_scale":
                    parameter.fill_(1)
                else:
                    bound = 1 / math.sqrt(parameter.shape[-1])
                    parameter.uniform_(-bound, bound)

    @property
    def takes_tokens(self) -> bool:
        """Whether ``forward`` takes ``assigned``: dropout and own activations see rows."""
        return is_named(self.activation) and not (self.dropout and self.training)

    def forward(
        self,
        x: Tensor,
        num_tokens_per_expert: Tensor,
        row_weights: Tensor | None = None,
        *,
        assigned: Assigned | None = None,
    ) -> Tensor:
        """Apply each expert to its rows.

        Args:
            x: [a, d] rows sorted by expert; rows past the counts are dead and may hold anything.
            num_tokens_per_expert: [e] int.
            row_weights: [a] multiplies each row between activation and down projection (and the
                down bias with it): the same answer as weighing the expert's output.
            assigned: x are tokens [t, d], whose rows are copied, weighed and added up on the way;
                where ``takes_tokens`` says so.

        Returns:
            [a, d], zero in dead rows; with ``assigned`` [t, d].
        """
        assert assigned is None or self.takes_tokens
        weights = self._weights(x.dtype)
        if self.backend == "liger":
            return liger_experts(x, weights, assigned)
        if not is_named(self.activation):
            y = self._written_out(x, weights, num_tokens_per_expert, row_weights)
        else:
            y = routed_experts(
                x,
                weights,
                num_tokens_per_expert,
                activation=self.activation,
                token_index=None if assigned is None else assigned.token_index,
                slot_of=None if assigned is None else assigned.slot_of,
                input_weights=None if assigned is None else assigned.input_weights,
                row_weights=row_weights,
                output_weights=None if assigned is None else assigned.output_weights,
                recompute_up=self.recompute_up,
                backend=self.backend,
            )
        return F.dropout(y, self.dropout, self.training) if self.dropout else y

    def _weights(self, dtype: torch.dtype) -> ExpertWeights:
        """Of the experts that are here."""

        def here(parameter: Tensor | None) -> Tensor | None:
            return None if parameter is None else self.part(parameter).to(dtype)

        return ExpertWeights(
            self.part(getattr(self, f"{self._up_name}_proj")).to(dtype),
            self.part(self.down_proj).to(dtype),
            here(getattr(self, f"{self._up_name}_bias")),
            here(self.down_bias),
            here(self.hidden_scale),
        )

    def _written_out(
        self,
        x: Tensor,
        weights: ExpertWeights,
        num_tokens_per_expert: Tensor,
        row_weights: Tensor | None,
    ) -> Tensor:
        """[a, d] -> [a, d] for any activation, each step with autograd's gradient."""
        z = grouped_mm(x, weights.up, num_tokens_per_expert, backend=self.backend)  # [a, 2h]
        if weights.up_bias is not None:
            z = z + _own_rows(weights.up_bias, num_tokens_per_expert, z.shape[0])
        hidden = self.activation.function(z)  # [a, h]
        if weights.hidden_scale is not None:
            scale = _own_rows(weights.hidden_scale, num_tokens_per_expert, hidden.shape[0])
            hidden = hidden * scale
        if row_weights is not None:
            hidden = hidden * row_weights[:, None].to(hidden.dtype)
        y = grouped_mm(hidden, weights.down, num_tokens_per_expert, backend=self.backend)  # [a, d]
        if weights.down_bias is not None:
            bias = _own_rows(weights.down_bias, num_tokens_per_expert, y.shape[0])
            y = y + (bias if row_weights is None else bias * row_weights[:, None].to(bias.dtype))
        return y


def _itself(parameter: Tensor) -> Tensor:
    return parameter


def _own_rows(values: Tensor, num_tokens_per_expert: Tensor, num_rows: int) -> Tensor:
    """[e, o] -> [a, o]: each row's expert's, zero for dead rows.

    With gradients a product with a 0/1 matrix, whose gradient is a product too. Without, the rows
    themselves.
    """
    if not torch.is_grad_enabled():
        return values_of_rows(values, num_tokens_per_expert, num_rows)
    return members(num_tokens_per_expert, num_rows, values.dtype).t() @ values


def check_backend(experts: GroupedExperts) -> None:
    """Hold experts against their back end.

    Raises:
        InputError: an unknown one, or something that "liger" does not have.
    """
    if experts.backend not in BACKENDS:
        raise InputError(f"backend {experts.backend!r} is not one of {', '.join(BACKENDS)}")
    if experts.backend != "liger":
        return
    named = experts.activation.name if is_named(experts.activation) else "your own"
    unlike = {
        f"the activation {named}": named != "swiglu",
        "biases": experts.down_bias is not None,
        "hidden_scale": experts.hidden_scale is not None,
        "dropout": experts.dropout > 0,
        "recompute_up": experts.recompute_up,
    }
    for what, there in unlike.items():
        if there:
            raise InputError(
                f"the back end 'liger' computes plain SwiGLU experts, but these have {what}: set "
                "the back end to 'auto'"
            )
    find_liger()
