"""Bring tokens to their experts and the answers back: on one process, and the place for others.

Letters: t tokens · k experts_per_token · a assignments · e experts · d dim.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from moe_builders.ops.permute import combine_rows, gather_rows


@dataclass(frozen=True)
class Assigned:
    """A routing as the products with the experts need it.

    Attributes:
        token_index: [a] int, sorted by expert; dead assignments come last.
        num_tokens_per_expert: [e] int, live assignments only.
        slot_of: [t, k] int, see ``Routing``, or None.
        input_weights: [a] multiply the experts' inputs. None: 1.
        row_weights: [a] multiply between activation and down projection. None: 1.
        output_weights: [a] multiply the answers. None: 1.
    """

    token_index: Tensor
    num_tokens_per_expert: Tensor
    slot_of: Tensor | None
    input_weights: Tensor | None = None
    row_weights: Tensor | None = None
    output_weights: Tensor | None = None


class Experts(Protocol):
    """What answers rows: ``GroupedExperts`` and its like.

    One with a true attribute ``takes_tokens`` also takes ``assigned``: it then gets tokens [t, d],
    copies and adds up rows itself, and gives [t, d].
    """

    def __call__(
        self, x: Tensor, num_tokens_per_expert: Tensor, row_weights: Tensor | None = None, /
    ) -> Tensor:
        """[a, d] -> [a, d]."""
        ...


class Dispatcher(Protocol):
    """How a layer's tokens reach its experts, wherever those are."""

    def __call__(self, tokens: Tensor, assigned: Assigned, experts: Experts, /) -> Tensor:
        """[t, d] -> [t, d], each token's (weighted) sum of its experts' answers."""
        ...


def dispatch_locally(tokens: Tensor, assigned: Assigned, experts: Experts) -> Tensor:
    """All experts are here: copy rows, let the experts answer, add up; or let them do all of it.

    Args:
        tokens: [t, d].
        assigned: of these tokens.
        experts: answers rows that are sorted by expert.

    Returns:
        [t, d]; zero for a token without assignments.
    """
    if getattr(experts, "takes_tokens", False):
        whole: Any = experts
        counts, weights = assigned.num_tokens_per_expert, assigned.row_weights
        return whole(tokens, counts, weights, assigned=assigned)
    rows = gather_rows(tokens, assigned.token_index, assigned.slot_of)  # [a, d]
    if assigned.input_weights is not None:
        rows = rows * assigned.input_weights[:, None].to(rows.dtype)
    answers = experts(rows, assigned.num_tokens_per_expert, assigned.row_weights)  # [a, d]
    return combine_rows(
        answers, assigned.output_weights, assigned.token_index, assigned.slot_of, tokens.shape[0]
    )
