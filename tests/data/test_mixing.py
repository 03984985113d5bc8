"""Several sets by weight: proportions, and each set's own passes across epochs."""

from collections import Counter

import pytest
from helpers import quick
from helpers_data import text_node, write_jsonl, write_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from moe_builders.data.datasets import build_dataset
from moe_builders.data.order import MixedOrder, largest_remainder
from moe_builders.data.rows import MixedDataset, PackedDataset
from moe_builders.data.tokenizer import HFTokenizer
from moe_builders.errors import InputError

lengths_and_weights = st.lists(
    st.tuples(st.integers(1, 30), st.floats(0.1, 10)), min_size=1, max_size=5
)


@quick
@given(sets=lengths_and_weights, seed=st.integers(0, 9), shuffle=st.booleans())
def test_proportions_and_passes(sets, seed, shuffle):
    lengths, weights = zip(*sets, strict=True)
    total = sum(lengths)
    order = MixedOrder(lengths=lengths, weights=weights, seed=seed, shuffle=shuffle)
    counts = largest_remainder(weights, total)
    given_so_far = Counter()
    for epoch in range(4):
        rows = order.epoch(epoch)
        assert rows == order.epoch(epoch)
        assert len(rows) == total
        given_so_far.update(rows)
        start = 0
        for length, count, weight in zip(lengths, counts, weights, strict=True):
            own = [row for row in rows if start <= row < start + length]
            assert len(own) == count
            assert abs(count - weight / sum(weights) * total) < 1
            times = [given_so_far[row] for row in range(start, start + length)]
            assert max(times) - min(times) <= 1, "none comes again before all have come"
            assert sum(times) == (epoch + 1) * count
            start += length


def test_orders_of_epochs_and_passes_differ():
    order = MixedOrder(lengths=[50, 50], weights=[1, 1], seed=0, shuffle=True)
    assert sorted(order.epoch(0)) == sorted(order.epoch(1)) == list(range(100))
    assert order.epoch(0) != order.epoch(1)
    assert order.epoch(0) != MixedOrder(
        lengths=[50, 50], weights=[1, 1], seed=1, shuffle=True).epoch(0)  # fmt: skip
    # a set's second pass is in an order of its own, and so is another set's
    twice = MixedOrder(lengths=[50, 1, 49], weights=[98, 1, 1], seed=0, shuffle=True)._walk
    assert twice(0, 0, 50) != twice(0, 50, 100)
    assert sorted(twice(0, 50, 100)) == list(range(50))
    alike = MixedOrder(lengths=[50, 50], weights=[1, 1], seed=0, shuffle=True)._walk
    assert alike(0, 0, 50) != [row - 50 for row in alike(1, 0, 50)]


def test_without_shuffling_the_sets_are_spread_evenly():
    order = MixedOrder(lengths=[6, 3], weights=[2, 1], seed=0, shuffle=False)
    assert order.epoch(0) == [0, 6, 1, 2, 7, 3, 4, 8, 5]
    assert largest_remainder([1, 1, 1], 10) == [4, 3, 3]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return HFTokenizer(write_tokenizer(tmp_path_factory.mktemp("tok")))


@pytest.fixture
def files(tmp_path):
    return [str(write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(n)]))
            for name, n in (("a", 12), ("b", 4))]  # fmt: skip


def test_a_list_with_weights_is_a_mixture(tokenizer, files):
    nodes = [text_node(files[0], weight=1), text_node(files[1], weight=3.0)]
    rows = build_dataset(nodes, tokenizer, max_seq_len=32)
    assert isinstance(rows, MixedDataset)
    assert rows.weights == [1, 3.0]
    texts = [tokenizer.decode(rows[i]["tokens"]) for i in range(len(rows))]
    assert texts == [f"a{i}" for i in range(12)] + [f"b{i}" for i in range(4)]
    packed = build_dataset([n | {"packed": True} for n in nodes], tokenizer, max_seq_len=8)
    assert isinstance(packed, MixedDataset)
    alone = [build_dataset(text_node(f, packed=True), tokenizer, max_seq_len=8) for f in files]
    assert all(isinstance(one, PackedDataset) for one in alone)
    assert [len(part) for part in packed.parts] == [len(one) for one in alone]
    one = build_dataset([nodes[0]], tokenizer, max_seq_len=32)
    assert len(one) == 12, "a weight without another set changes nothing"


BAD = {
    "zero": ((0, 1), r"dataset\[0\].weight is 0, but must be a number above 0"),
    "negative": ((1, -0.5), r"dataset\[1\].weight is -0.5, but must be a number above 0"),
    "word": (("much", 1), r"dataset\[0\].weight is 'much', but must be a number above 0"),
    "null": ((None, 1), r"dataset\[0\].weight is None, but must"),
    "switch": ((True, 1), r"dataset\[0\].weight is True, but must"),
    "infinite": ((float("inf"), 1), r"dataset\[0\].weight is inf, but must"),
    "nothing": ((1, 1e-9), r"dataset\[1\].weight \(1e-09\) gives it none of the 16 rows"),
    "missing": ((1, ...), r"dataset\[1\] has no weight, but others of the list have: give one to"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_weights(tokenizer, files, case):
    weights, says = BAD[case]
    nodes = [text_node(file) | ({} if weight is ... else {"weight": weight})
             for file, weight in zip(files, weights, strict=True)]  # fmt: skip
    with pytest.raises(InputError, match=says):
        build_dataset(nodes, tokenizer, max_seq_len=32)


def test_validation_is_not_mixed(tokenizer, files):
    nodes = [text_node(file, weight=1) for file in files]
    with pytest.raises(InputError, match="dataset_val has a weight, but validation takes every"):
        build_dataset(nodes, tokenizer, max_seq_len=32, path="dataset_val", validation=True)
