"""A sized set's place: from any step on, the same batches, whatever shares or prepares them."""

import gc
import json
import multiprocessing
import os
import signal

import pytest
import torch
from helpers import quick
from hypothesis import given
from hypothesis import strategies as st
from test_packing import Documents

from moe_builders.data.loader import Batching, SizedLoader, total_steps
from moe_builders.data.rows import MixedDataset, PackedDataset, ShiftedDataset
from moe_builders.errors import InputError

LENGTHS = [3, 1, 8, 5, 2, 7, 4, 6, 2, 2, 5]


def data(kind):
    if kind == "packed":
        return PackedDataset(Documents(LENGTHS), max_seq_len=8)
    if kind == "mixed":
        parts = [ShiftedDataset(Documents(LENGTHS), max_seq_len=8),
                 ShiftedDataset(Documents([4] * 3), max_seq_len=8)]  # fmt: skip
        return MixedDataset(parts, [0.7, 0.3])
    return ShiftedDataset(Documents(LENGTHS), max_seq_len=8)


def loader_of(rows, *, seed=3, shuffle=True, **changes):
    batching = Batching(**({"batch_size": 1, "max_seq_len": 8, "pad_id": 0} | changes))
    return SizedLoader(rows, batching, seed=seed, shuffle=shuffle)


def same(one, other):
    names = ("tokens", "labels", "positions", "sequence_ids", "mask")
    assert (one.num_cut, one.num_lost, one.packed) == (other.num_cut, other.num_lost, other.packed)
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def all_same(steps, others):
    assert [len(step) for step in steps] == [len(step) for step in others]
    return all(same(a, b) for s, o in zip(steps, others, strict=True)
               for a, b in zip(s, o, strict=True))  # fmt: skip


@pytest.mark.parametrize("kind", ["shifted", "packed", "mixed"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_any_step_can_be_gone_back_to(kind, shuffle):
    rows = data(kind)
    straight = list(loader_of(rows, shuffle=shuffle, accumulation=2).steps(epochs=3))
    assert len(straight) == 3 * (len(rows) // 2)
    for stop in range(len(straight) + 1):
        first = loader_of(rows, shuffle=shuffle, accumulation=2)
        steps = first.steps(epochs=3)
        before = [next(steps) for _ in range(stop)]
        state = json.loads(json.dumps(first.state_dict()))
        second = loader_of(rows, shuffle=shuffle, accumulation=2)
        assert second.load_state_dict(state) == []
        assert all_same([*before, *second.steps(epochs=3)], straight)


def test_a_stop_with_workers_goes_on_with_any_number_of_them():
    """They have prepared batches beyond the place; those are not lost."""
    rows = data("shifted")
    straight = list(loader_of(rows).steps(epochs=2))
    first = loader_of(rows, num_workers=2, prefetch_factor=3)
    steps = first.steps(epochs=2)
    before = [next(steps) for _ in range(4)]
    state = first.state_dict()
    assert (state["epoch"], state["samples"]) == (0, 4)
    for num_workers in (0, 1):
        second = loader_of(rows, num_workers=num_workers)
        second.load_state_dict(state)
        assert all_same([*before, *second.steps(epochs=2)], straight)


def samples_of(loaders, epochs=1):
    """Token of each row that comes, in the order of all processes' shares."""
    found = []
    for steps in zip(*[loader.steps(epochs=epochs) for loader in loaders], strict=True):
        for micro in zip(*steps, strict=True):
            rows = [batch.tokens[:, 0].tolist() for batch in micro]
            found += [row for place in zip(*rows, strict=True) for row in place]
    return found


@quick
@given(n=st.integers(8, 40), stop=st.integers(0, 3), seed=st.integers(0, 5))
def test_the_next_sample_is_the_next_sample_on_other_processes(n, stop, seed):
    """Another number of processes, rows or micro-batches goes on at the very sample."""
    rows = ShiftedDataset(Documents([1] * n), max_seq_len=8)
    order = samples_of([loader_of(rows, seed=seed)])
    assert sorted(order) == list(range(n))
    first = loader_of(rows, seed=seed, batch_size=2)
    steps = first.steps(epochs=1)
    for _ in range(stop):
        next(steps)
    for size, batch_size, accumulation in [(1, 1, 1), (2, 1, 1), (3, 1, 2), (2, 2, 1)]:
        ranks = [loader_of(rows, seed=seed, rank=rank, size=size, batch_size=batch_size,
                           accumulation=accumulation) for rank in range(size)]  # fmt: skip
        for rank in ranks:
            assert rank.load_state_dict(first.state_dict()) == []
        rest = samples_of(ranks)
        per_step = size * batch_size * accumulation
        assert rest == order[2 * stop :][: (n - 2 * stop) // per_step * per_step]
        assert len({json.dumps(rank.state_dict()) for rank in ranks}) == 1


@pytest.mark.parametrize("size", [1, 2, 3])
def test_two_epochs_see_each_sample_exactly_twice_over_the_ranks(size):
    rows = ShiftedDataset(Documents([2] * 12), max_seq_len=8)
    ranks = [loader_of(rows, rank=rank, size=size, batch_size=2) for rank in range(size)]
    found = samples_of(ranks, epochs=2)
    first, second = found[:12], found[12:]
    assert sorted(first) == sorted(second) == [2 * n for n in range(12)]
    assert first != second, "in another order"


def test_what_the_order_depends_on_is_compared():
    rows = data("shifted")
    saved = loader_of(rows)
    next(saved.steps(epochs=1))
    state = saved.state_dict()
    assert loader_of(rows).load_state_dict(state) == []
    assert loader_of(rows, seed=4).load_state_dict(state) == [
        "seed was 3 and is now 4: the samples come in another order than before, so some come "
        "twice in this epoch and others not at all"
    ]
    (sentence,) = loader_of(rows, shuffle=False).load_state_dict(state)
    assert sentence.startswith("shuffle was true and is now false: ")
    (sentence,) = loader_of(rows, max_seq_len=9).load_state_dict(state)
    assert sentence.startswith("max_seq_len was 8 and is now 9: ")
    more = ShiftedDataset(Documents([*LENGTHS, 1]), max_seq_len=8)
    for other, says in [
        (more, "the numbers of rows of the data sets was 11 when it was saved and is now 12"),
        (data("packed"), "packed was false when it was saved and is now true"),
        (data("mixed"), "the numbers of rows of the data sets was 11 .* is now 11, 3"),
    ]:
        with pytest.raises(InputError, match=says):
            loader_of(other).load_state_dict(state)
    with pytest.raises(InputError, match="no place in the data that was saved"):
        loader_of(rows).load_state_dict({"epoch": 1, "samples": 2})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_leave_signals_to_the_run(number):
    """They reach every process of a terminal or of a job; the run decides what to do."""
    rows = data("shifted")
    straight = list(loader_of(rows).steps(epochs=2))
    gc.collect()  # other tests' workers
    others = multiprocessing.active_children()
    steps = loader_of(rows, num_workers=1).steps(epochs=2)
    first = next(steps)
    (worker,) = set(multiprocessing.active_children()) - set(others)
    os.kill(worker.pid, number)
    assert all_same([first, *steps], straight)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nobody_elses_random_numbers_are_drawn(num_workers):
    """A resumed run opens its loader once more than the straight one."""
    before = torch.get_rng_state()
    for rows in (data("shifted"), data("mixed")):
        loader = loader_of(rows, num_workers=num_workers)
        assert next(loader.steps(epochs=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_number_of_steps():
    loader = loader_of(data("shifted"), batch_size=2)
    assert loader.steps_per_epoch == 5
    assert total_steps(loader, epochs=3, max_steps=None) == 15
    assert total_steps(loader, epochs=3, max_steps=7) == 7
    assert total_steps(loader, epochs=1, max_steps=7) == 5


def test_cut_samples_are_told_and_counted():
    packed = PackedDataset(Documents(LENGTHS), max_seq_len=5, split_across_pack=False)
    loader = loader_of(packed, max_seq_len=5)
    assert loader.notes == [
        "3 samples are longer than max_seq_len (5) and were cut there: 6 tokens are left out"
    ]
    split = PackedDataset(Documents(LENGTHS), max_seq_len=5, split_across_pack=False,
                          long_samples="split")  # fmt: skip
    assert loader_of(split, max_seq_len=5).notes == [
        "3 samples are longer than max_seq_len (5) and were split into several rows"
    ]
    assert loader_of(data("shifted")).notes == []
    for rows in (packed, split, ShiftedDataset(Documents(LENGTHS), max_seq_len=5)):
        batches = [b for step in loader_of(rows, max_seq_len=5).steps(epochs=1) for b in step]
        assert sum(batch.num_cut for batch in batches) == 3
        assert sum(batch.num_lost for batch in batches) == (0 if rows is split else 6)
