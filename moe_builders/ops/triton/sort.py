"""Assignments sorted by expert in two kernels: a counting sort. The twin of ``permute``'s.

Letters: t tokens · k experts_per_token · a assignments · e experts · n tiles of assignments.

1. In every tile of 128 assignments: how many before each one in the tile have the same expert (its
   rank), and how many of each expert the tile holds: one cell of a table [e + 1, n].
2. The running sum over the table, expert by expert and tile by tile within an expert, is where each
   tile's run of an expert ends in the sorted list.
3. Place = end of the cell before + rank. Stable, since tiles and ranks follow the order given.

No atomics: a cell has one writer, the last of its expert in the tile. What an assignment is
compared with is its tile, so that the work does not grow with the number of experts.
"""

# Triton's language is not Python to a type checker, and Triton is not everywhere:
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_builders.ops.permute import SortedAssignments

# A smaller tile makes the table longer, a larger one makes comparisons the greater part: a · 128 of
# them take about as long as reading the experts. Compared with 32 others at a time, a thread of 4
# warps needs 80 registers; with all 128 it would need more than it has.
_TILE, _CHUNK = 128, 32


def sort_by_expert(expert: Tensor, num_experts: int, live: Tensor | None) -> SortedAssignments:
    """Sort the assignments of t tokens by expert, stably, dead ones last.

    Args:
        expert: [t, k] int, the experts each token goes to.
        num_experts: e. An expert outside [0, e) counts as dead.
        live: [t, k] bool, False where the assignment is void; None when all count.
    """
    t, k = expert.shape
    a = t * k
    n = -(-a // _TILE)
    order, token_index, slot_of = (
        torch.empty(shape, dtype=torch.int64, device=expert.device)
        for shape in ((a,), (a,), (t, k))  # [a], [a], [t, k]
    )
    if a == 0:
        counts = torch.zeros(num_experts, dtype=torch.int32, device=expert.device)  # [e]
        return SortedAssignments(order, token_index, counts, slot_of)
    counts = torch.empty(num_experts, dtype=torch.int32, device=expert.device)  # [e]
    rank = torch.empty(a, dtype=torch.int32, device=expert.device)  # [a]
    table = torch.zeros((num_experts + 1) * n, dtype=torch.int32, device=expert.device)
    expert = expert.contiguous()
    live = expert if live is None else live.contiguous()  # a pointer that is not read
    has_live = live is not expert
    with torch.cuda.device_of(expert):  # Triton launches on the current device
        _rank_kernel[(n,)](
            expert, live, rank, table, a, n, E=num_experts,
            HAS_LIVE=has_live, TILE=_TILE, CHUNK=_CHUNK
        )  # fmt: skip
        ends = table.cumsum(0, dtype=torch.int32)
        _place_kernel[(n,)](
            expert, live, rank, ends, order, token_index, slot_of, counts, a, n,
            E=num_experts, K=k, HAS_LIVE=has_live, TILE=_TILE
        )  # fmt: skip
    return SortedAssignments(order, token_index, counts, slot_of)


@triton.jit
def _experts_of(
    expert_ptr, live_ptr, place, inside, E: tl.constexpr, HAS_LIVE: tl.constexpr
):  # fmt: skip
    """Who each place goes to: e where dead, -1 past the end."""
    expert = tl.load(expert_ptr + place, mask=inside, other=0)
    known = (expert >= 0) & (expert < E)
    if HAS_LIVE:
        known = known & (tl.load(live_ptr + place, mask=inside, other=0) != 0)
    expert = tl.where(known, expert, E).to(tl.int32)
    return tl.where(inside, expert, -1)


@triton.jit
def _rank_kernel(
    expert_ptr, live_ptr, rank_ptr, table_ptr, num_assignments, num_tiles,
    E: tl.constexpr, HAS_LIVE: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    lane = tl.arange(0, TILE)
    place = tile * TILE + lane
    inside = place < num_assignments
    expert = _experts_of(expert_ptr, live_ptr, place, inside, E, HAS_LIVE)
    rank = tl.zeros((TILE,), dtype=tl.int32)
    total = tl.zeros((TILE,), dtype=tl.int32)
    for first in tl.static_range(0, TILE, CHUNK):
        other_lane = first + tl.arange(0, CHUNK)
        other_place = tile * TILE + other_lane
        other_inside = other_place < num_assignments
        other = _experts_of(expert_ptr, live_ptr, other_place, other_inside, E, HAS_LIVE)
        same = expert[:, None] == other[None, :]
        earlier = other_lane[None, :] < lane[:, None]
        rank += tl.sum((same & earlier).to(tl.int32), axis=1)
        total += tl.sum(same.to(tl.int32), axis=1)
    tl.store(rank_ptr + place, rank, mask=inside)
    cell = expert.to(tl.int64) * num_tiles + tile
    tl.store(table_ptr + cell, total, mask=inside & (rank == total - 1))


@triton.jit
def _place_kernel(
    expert_ptr, live_ptr, rank_ptr, ends_ptr, order_ptr, token_ptr, slot_ptr, counts_ptr,
    num_assignments, num_tiles,
    E: tl.constexpr, K: tl.constexpr, HAS_LIVE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    lane = tl.arange(0, TILE)
    place = tile * TILE + lane
    inside = place < num_assignments
    expert = _experts_of(expert_ptr, live_ptr, place, inside, E, HAS_LIVE)
    cell = expert.to(tl.int64) * num_tiles + tile
    begin = tl.load(ends_ptr + cell - 1, mask=inside & (cell > 0), other=0)
    slot = begin + tl.load(rank_ptr + place, mask=inside, other=0)
    tl.store(slot_ptr + place, slot.to(tl.int64), mask=inside)
    tl.store(order_ptr + slot, place.to(tl.int64), mask=inside)
    tl.store(token_ptr + slot, (place // K).to(tl.int64), mask=inside)
    if tile == 0:  # how far an expert's last cell is from the last one of the expert before
        for first in range(0, E, TILE):
            row = first + lane
            last = (row.to(tl.int64) + 1) * num_tiles - 1
            end = tl.load(ends_ptr + last, mask=row < E, other=0)
            before = (row > 0) & (row < E)
            start = tl.load(ends_ptr + last - num_tiles, mask=before, other=0)
            tl.store(counts_ptr + row, end - start, mask=row < E)
