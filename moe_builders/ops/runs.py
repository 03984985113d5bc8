"""Whose a row is: rows sorted by expert stand in runs, whose lengths are the experts' counts.

Letters: a rows (assignments, sorted by expert; dead ones last) · e experts · o columns.
"""

import torch
from torch import Tensor


def expert_of_rows(num_tokens_per_expert: Tensor, num_rows: int) -> Tensor:
    """[a] int, the expert of each sorted row; e (one past the last) for dead rows."""
    ends = num_tokens_per_expert.cumsum(0)  # [e]
    rows = torch.arange(num_rows, device=ends.device)
    return torch.searchsorted(ends, rows, right=True)


def live_rows(num_tokens_per_expert: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """[a] bool, whether a row belongs to an expert, and [a] int, which; e - 1 where to none."""
    expert = expert_of_rows(num_tokens_per_expert, num_rows)  # [a]
    last = num_tokens_per_expert.shape[0] - 1
    return expert <= last, expert.clamp(max=last)


def values_of_rows(values: Tensor, num_tokens_per_expert: Tensor, num_rows: int) -> Tensor:
    """[e, o] -> [a, o]: each row's expert's, zero for dead rows."""
    live, expert = live_rows(num_tokens_per_expert, num_rows)
    return torch.where(live[:, None], values.index_select(0, expert), 0)


def members(num_tokens_per_expert: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """[e, a] 0 or 1, whether a row is an expert's."""
    expert = expert_of_rows(num_tokens_per_expert, num_rows)  # [a]
    numbers = torch.arange(num_tokens_per_expert.shape[0], device=expert.device)
    return (numbers[:, None] == expert).to(dtype)


def sum_experts(rows: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
    """[a, o] -> [e, o]: the sum of each expert's rows; dead ones are finite.

    A product with a 0/1 matrix: summed in a fixed order, without atomics.
    """
    return members(num_tokens_per_expert, rows.shape[0], rows.dtype) @ rows
