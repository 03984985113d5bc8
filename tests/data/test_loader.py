"""The order of samples: the same ones in a step on any number of processes."""

import pytest
import torch
from helpers import quick
from hypothesis import given
from hypothesis import strategies as st
from test_packing import Documents
from torch._utils import ExceptionWrapper

from moe_builders.data.loader import Batching, SizedLoader
from moe_builders.data.rows import PackedDataset, ShiftedDataset
from moe_builders.data.sampler import StepSampler
from moe_builders.errors import InputError
from moe_builders.parallel.launch import launch

SPLITS = [(1, 8, 1), (8, 1, 1), (1, 1, 8), (2, 2, 2), (4, 1, 2), (2, 4, 1), (4, 2, 1)]


def samplers(num_samples, size, batch_size, accumulation=1, **options):
    return [
        StepSampler(num_samples=num_samples, batch_size=batch_size, accumulation=accumulation,
                    rank=rank, size=size, **options)
        for rank in range(size)
    ]  # fmt: skip


def steps_of(ranks, accumulation):
    """For each step the samples of all ranks and micro-batches, in order of their number."""
    batches = [list(rank) for rank in ranks]
    assert len({len(b) for b in batches}) == 1, "as many micro-batches on every rank"
    assert all(len(b) == len(rank) for b, rank in zip(batches, ranks, strict=True))
    return [
        sorted(n for rank in batches for micro in rank[at : at + accumulation] for n in micro)
        for at in range(0, len(batches[0]), accumulation)
    ]


@quick
@given(num_samples=st.integers(8, 50), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 5))
def test_a_steps_samples_do_not_depend_on_the_split(num_samples, seed, epoch):
    found = []
    for size, batch_size, accumulation in SPLITS:
        ranks = samplers(num_samples, size, batch_size, accumulation, seed=seed)
        for rank in ranks:
            rank.set_epoch(epoch)
        found.append(steps_of(ranks, accumulation))
    assert all(other == found[0] for other in found)
    everything = [n for step in found[0] for n in step]
    assert len(found[0]) == num_samples // 8
    assert len(everything) == len(set(everything)) == 8 * len(found[0])
    assert set(everything) <= set(range(num_samples))


@quick
@given(num_samples=st.integers(1, 40), size=st.integers(1, 4), batch_size=st.integers(1, 4),
       shuffle=st.booleans())  # fmt: skip
def test_keep_last_covers_every_sample_once(num_samples, size, batch_size, shuffle):
    ranks = samplers(num_samples, size, batch_size, keep_last=True, shuffle=shuffle)
    steps = steps_of(ranks, 1)
    real = [n for step in steps for n in step if n >= 0]
    assert sorted(real) == list(range(num_samples))
    assert all(len(step) == size * batch_size for step in steps)
    assert sum(n < 0 for step in steps for n in step) < size * batch_size, "no empty step"


def order(seed, epoch, **options):
    (sampler,) = samplers(64, 1, 4, seed=seed, **options)
    sampler.set_epoch(epoch)
    return [n for micro in sampler for n in micro]


def test_orders_differ_by_epoch_and_seed_and_come_again():
    orders = {(seed, epoch): order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len({tuple(o) for o in orders.values()}) == 9
    assert all(sorted(o) == list(range(64)) for o in orders.values())
    torch.manual_seed(123)  # nobody else's random numbers matter
    assert all(order(*key) == value for key, value in orders.items())
    assert order(0, 0, shuffle=False) == order(7, 3, shuffle=False) == list(range(64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, but must be at least 1"),
        ({"accumulation": -1}, "gradient_accumulation_steps is -1, but must be at least 1"),
        ({"batch_size": 4, "accumulation": 3}, "has 10 rows, fewer than the 24 of one step: lower"),
        ({"num_samples": 0, "keep_last": True}, "has 0 rows, fewer than the"),
    ],
)  # fmt: skip
def test_sizes_that_make_no_step(options, message):
    sizes = {"num_samples": 10, "batch_size": 1, "rank": 0, "size": 2} | options
    with pytest.raises(InputError, match=message):
        StepSampler(**sizes)


def loader_of(dataset, *, seed=0, shuffle=True, validation=False, **changes):
    batching = Batching(**({"batch_size": 2, "max_seq_len": 8, "pad_id": 0} | changes))
    return SizedLoader(dataset, batching, seed=seed, shuffle=shuffle, validation=validation)


LENGTHS = [3, 1, 8, 5, 2, 7, 4, 6, 2, 2, 5]


@pytest.mark.parametrize("packed", [False, True])
def test_workers_change_nothing(packed):
    kind = PackedDataset if packed else ShiftedDataset
    dataset = kind(Documents(LENGTHS), max_seq_len=8)
    found = []
    for num_workers in (0, 2):
        loader = loader_of(dataset, num_workers=num_workers, accumulation=2)
        found.append([b for step in loader.steps(epochs=2) for b in step])
    assert len(found[0]) == len(found[1]) == 2 * 2 * (len(dataset) // 4)
    for alone, helped in zip(*found, strict=True):
        for name in ("tokens", "labels", "positions", "sequence_ids", "mask"):
            assert torch.equal(getattr(alone, name), getattr(helped, name))
        assert alone.packed == helped.packed == packed


def test_steps_are_whole_and_epochs_differ():
    loader = loader_of(ShiftedDataset(Documents(LENGTHS), max_seq_len=8), accumulation=2)
    steps = list(loader.steps(epochs=3))
    assert [len(step) for step in steps] == [2] * 6, "11 samples are 2 steps of 4"
    firsts = [[tuple(b.tokens[:, 0].tolist()) for b in steps[at]] for at in (0, 2, 4)]
    assert len({tuple(first) for first in firsts}) == 3


def test_shapes():
    shifted = ShiftedDataset(Documents(LENGTHS), max_seq_len=8)
    widths = {b.tokens.shape[1] for b in loader_of(shifted, shuffle=False)}
    assert widths == {3, 8, 7, 6, 2}, "each as long as its longest"
    widths = {b.tokens.shape[1] for b in loader_of(shifted, shuffle=False, pad_to_multiple_of=3)}
    assert widths == {3, 6, 8}, "rounded up, but not beyond max_seq_len"
    packed = PackedDataset(Documents(LENGTHS), max_seq_len=8)
    batches = list(loader_of(packed, validation=True))
    assert {b.tokens.shape for b in batches} == {(2, 8)}
    assert sum(b.num_real for b in batches) == sum(LENGTHS)


def test_a_rank_that_has_run_out_gets_padding():
    dataset = ShiftedDataset(Documents([3, 3, 3]), max_seq_len=8)
    for rank, real in ((0, [3, 3]), (1, [3, 0])):
        loader = loader_of(dataset, batch_size=1, rank=rank, size=2, validation=True)
        assert [b.num_real for b in loader] == real


def test_a_sample_that_a_worker_cannot_use_is_one_sentence(capsys):
    """As the loader raises a worker's error again: in a message with the worker's traceback.

    (No worker here: after an error torch waits five seconds for it.)
    """
    dataset = ShiftedDataset(Documents([3, 9, 3]), max_seq_len=8, long_samples="refuse")

    def main(_):
        try:
            dataset[1]
        except InputError:
            wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
        wrapped.reraise()

    assert launch(main, lambda: None) == 2
    assert capsys.readouterr().err == (
        "error: dataset: sample 1 has 9 tokens, but max_seq_len is 8: raise max_seq_len, or set "
        "long_samples to truncate or split\n"
    )
