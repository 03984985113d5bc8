"""Who holds which box: by hand, against torch, and as a partition of the whole."""

import itertools
import math

import pytest
import torch
from helpers import quick
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from moe_builders.parallel.boxes import (
    around,
    box_elements,
    box_shape,
    in_rows,
    merged,
    overlap,
    shard_box,
    whole_box,
    within,
)


def sides(*ends: tuple[int, int]) -> tuple[slice, ...]:
    return tuple(slice(*end) for end in ends)


def coordinates(sizes):
    return itertools.product(*map(range, sizes))


def boxes_of(shape, sizes, places):
    return [shard_box(shape, sizes, places, at) for at in coordinates(sizes)]


@pytest.mark.parametrize(
    ("sizes", "places", "wanted"),
    [
        ((1,), [Shard(0)], [(0, 5)]),
        ((4,), [Shard(0)], [(0, 2), (2, 4), (4, 5), (5, 5)]),
        ((2, 2), [Replicate(), Shard(0)], [(0, 3), (3, 5), (0, 3), (3, 5)]),
        # the left axis first: 3 and 2 rows, then 2 and 1, 1 and 1
        ((2, 2), [Shard(0), Shard(0)], [(0, 2), (2, 3), (3, 4), (4, 5)]),
        # the right axis first: it has rows 0-2 and 3-4, of which the left one then has parts
        ((2, 2), [_StridedShard(0, split_factor=2), Shard(0)], [(0, 2), (3, 4), (2, 3), (4, 5)]),
        # nothing in front of it has cut: as if it were not strided
        ((2, 2), [_StridedShard(0, split_factor=1), Replicate()], [(0, 3), (0, 3), (3, 5), (3, 5)]),
    ],
)  # fmt: skip
def test_five_rows_by_hand(sizes, places, wanted):
    found = boxes_of((5, 3), sizes, places)
    assert found == [sides(rows, (0, 3)) for rows in wanted]


def test_two_dims_by_hand():
    """Experts over two processes and their second dim over two more."""
    places = [Replicate(), Shard(1), Shard(0)]
    assert shard_box((8, 6, 5), (3, 2, 2), places, (2, 1, 0)) == sides((0, 4), (3, 6), (0, 5))
    assert shard_box((), (3,), [Replicate()], (1,)) == ()


def test_a_strided_axis_between_others():
    """Only the axis right of it comes before it; the one on its left comes before both."""
    places = [Shard(0), _StridedShard(0, split_factor=2), Shard(0)]
    found = boxes_of((16,), (2, 2, 2), places)
    starts = [box[0].start for box in found]
    assert starts == [0, 4, 2, 6, 8, 12, 10, 14]
    assert all(box_elements(box) == 2 for box in found)


def test_what_holds_no_values_or_fits_no_order():
    with pytest.raises(AssertionError, match="holds no values"):
        shard_box((4,), (2,), [Partial()], (0,))
    with pytest.raises(AssertionError, match="split_factor of axis 0"):
        shard_box((4,), (2, 2), [_StridedShard(0, split_factor=3), Shard(0)], (0, 0))


@st.composite
def layouts(draw):
    """A shape, a mesh and placements as FSDP and experts' parallelism make them."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    copies, shards, experts = (draw(st.integers(1, 4)) for _ in range(3))
    dim = draw(st.integers(0, len(shape) - 1))
    strided = draw(st.booleans())
    if strided:  # each process of the axis behind it has as much: torch's arithmetic needs that
        shape = (shape[0] * experts, *shape[1:])
    inner = Shard(dim) if not strided or dim else _StridedShard(0, split_factor=experts)
    return shape, (copies, shards, experts), [Replicate(), inner, Shard(0)]


@quick
@given(layouts())
def test_boxes_are_torchs_and_make_up_the_whole(layout):
    shape, sizes, places = layout
    times = torch.zeros(shape, dtype=torch.int64)
    for at in coordinates(sizes):
        box = shard_box(shape, sizes, places, at)
        times[box] += 1
        wanted, offset = _compute_local_shape_and_global_offset(shape, sizes, list(at), places)
        assert math.prod(wanted) == box_elements(box)
        if box_elements(box):
            assert (box_shape(box), tuple(side.start for side in box)) == (wanted, offset)
    assert bool((times == sizes[0]).all())


def test_what_boxes_have_in_common():
    first, second = sides((0, 4), (2, 6)), sides((3, 9), (0, 3))
    assert overlap(first, second) == overlap(second, first) == sides((3, 4), (2, 3))
    assert overlap(first, sides((4, 9), (2, 6))) is None
    assert overlap((), ()) == ()
    assert within(sides((3, 4), (2, 3)), first) == sides((3, 4), (0, 1))
    assert around([first, second]) == sides((0, 9), (0, 6))
    assert whole_box((2, 3)) == sides((0, 2), (0, 3))
    assert box_shape(second) == (6, 3)


GATES_AND_UPS = [((1, 2), (0, 3)), ((0, 1), (3, 6)), ((0, 1), (0, 3)), ((1, 2), (3, 6)),
                 ((2, 3), (0, 3))]  # fmt: skip


@pytest.mark.parametrize(
    ("boxes", "most", "wanted"),
    [
        ([], 99, []),
        # of experts 0 and 1, then one more gate
        (GATES_AND_UPS, 99, [(((0, 2), (0, 6)), [2, 1, 0, 3]), (((2, 3), (0, 3)), [4])]),
        (GATES_AND_UPS, 6, [(((0, 1), (0, 6)), [2, 1]), (((1, 2), (0, 6)), [0, 3]),
                            (((2, 3), (0, 3)), [4])]),
        ([((0, 1), (0, 3)), ((1, 2), (0, 3))], 99, [(((0, 2), (0, 3)), [0, 1])]),
        ([((0, 1), (0, 3)), ((2, 3), (0, 3))], 99, [(((0, 1), (0, 3)), [0]),
                                                    (((2, 3), (0, 3)), [1])]),
        ([((0, 4), (0, 3))] * 2, 1, [(((0, 4), (0, 3)), [0, 1])]),  # tied: two names, held once
        ([()] * 2, 1, [((), [0, 1])]),
    ],
)  # fmt: skip
def test_boxes_are_joined_where_it_costs_nothing(boxes, most, wanted):
    found = merged([sides(*box) for box in boxes], most)
    assert found == [(sides(*box), members) for box, members in wanted]


@quick
@given(st.lists(st.tuples(*(st.integers(0, 5) for _ in range(4))), max_size=8), st.integers(1, 30))
def test_joined_boxes_hold_all_that_was_asked_for_and_not_more(numbers, most):
    boxes = [sides((a, a + n % 3 + 1), (b, b + m % 3 + 1)) for a, n, b, m in numbers]
    found = merged(boxes, most)
    assert sorted(number for _, members in found for number in members) == list(range(len(boxes)))
    for big, members in found:
        parts = [boxes[number] for number in members]
        assert all(overlap(box, big) == box for box in parts)
        assert box_elements(big) <= sum(map(box_elements, parts))
        assert box_elements(big) <= max(most, *map(box_elements, parts))


def test_a_box_in_rows():
    box = sides((3, 8), (2, 4))
    assert in_rows(box, 4) == [sides(rows, (2, 4)) for rows in ((3, 5), (5, 7), (7, 8))]
    assert in_rows(box, 1) == [sides((n, n + 1), (2, 4)) for n in range(3, 8)]
    assert in_rows(box, 10) == [box]
    assert in_rows((), 1) == [()]
    assert in_rows(sides((2, 2), (0, 3)), 9) == []
