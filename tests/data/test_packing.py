"""Packed rows: every token once, no document beside itself, no label across a border."""

from itertools import pairwise

import pytest
import torch
from helpers import quick
from hypothesis import given
from hypothesis import strategies as st

from moe_builders.data.batch import collate
from moe_builders.data.rows import PackedDataset, ShiftedDataset
from moe_builders.errors import InputError
from moe_builders.losses import IGNORE_INDEX as NONE

lengths_of_documents = st.lists(st.integers(0, 11), max_size=12)
row_lengths = st.integers(1, 8)


class Documents:
    """Documents of the given lengths; every token of them all has an id of its own."""

    def __init__(self, lengths, unlabelled=()):
        self.samples, first = [], 0
        for length in lengths:
            tokens = list(range(first, first + length))
            labels = [NONE if token in unlabelled else token for token in tokens]
            self.samples.append({"tokens": tokens, "labels": labels})
            first += length

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def rows_of(packed):
    return [(row["tokens"].tolist(), row["labels"].tolist(), row["lengths"])
            for row in (packed[i] for i in range(len(packed)))]  # fmt: skip


@quick
@given(lengths=lengths_of_documents, size=row_lengths)
def test_split_rows_hold_every_token_once_in_order(lengths, size):
    rows = rows_of(PackedDataset(Documents(lengths), max_seq_len=size, split_across_pack=True))
    assert [token for tokens, _, _ in rows for token in tokens] == list(range(sum(lengths)))
    assert all(len(tokens) == size for tokens, _, _ in rows[:-1]), "filled to the end"
    assert all(tokens for tokens, _, _ in rows)


@quick
@given(lengths=lengths_of_documents, size=st.integers(11, 24))
def test_unsplit_rows_hold_whole_documents_in_order(lengths, size):
    rows = rows_of(PackedDataset(Documents(lengths), max_seq_len=size, split_across_pack=False))
    assert [token for tokens, _, _ in rows for token in tokens] == list(range(sum(lengths)))
    assert [n for _, _, row in rows for n in row] == [n for n in lengths if n]
    assert all(len(tokens) <= size for tokens, _, _ in rows)
    for (tokens, _, _), (_, _, following) in pairwise(rows):
        assert len(tokens) + following[0] > size, "the next document would have fitted"


@quick
@given(lengths=lengths_of_documents, size=row_lengths, split=st.booleans())
def test_a_label_is_the_next_token_of_the_same_document(lengths, size, split):
    """Also where a document goes on in the next row: its first token there is still predicted."""
    size = size if split else size + 11
    rows = rows_of(PackedDataset(Documents(lengths), max_seq_len=size, split_across_pack=split))
    last_tokens = {sum(lengths[: i + 1]) - 1 for i in range(len(lengths))}
    for tokens, labels, parts in rows:
        assert sum(parts) == len(tokens) == len(labels)
        for token, label in zip(tokens, labels, strict=True):
            assert label == (NONE if token in last_tokens else token + 1)


@quick
@given(lengths=lengths_of_documents, size=row_lengths, split=st.booleans())
def test_no_document_sees_its_neighbour(lengths, size, split):
    size = size if split else size + 11
    packed = PackedDataset(Documents(lengths), max_seq_len=size, split_across_pack=split)
    if len(packed) == 0:
        return
    owner = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)])
    batch = collate([packed[i] for i in range(len(packed))], pad_id=0, packed=True, length=size)
    attends = batch.attention_mask
    assert attends is not None
    for i in range(len(packed)):
        real = int(batch.mask[i].sum())
        owners = owner[batch.tokens[i, :real]]
        assert torch.equal(attends[i, :real, :real],
                           (owners[:, None] == owners[None, :]).tril())  # fmt: skip
        assert not attends[i, :real, real:].any(), "nothing real looks at padding"


def test_one_document_over_three_rows_by_hand():
    packed = PackedDataset(Documents([2, 7]), max_seq_len=4, split_across_pack=True)
    assert rows_of(packed) == [
        ([0, 1, 2, 3], [1, NONE, 3, 4], [2, 2]),
        ([4, 5, 6, 7], [5, 6, 7, 8], [4]),
        ([8], [NONE], [1]),
    ]


def test_masked_labels_stay_masked():
    packed = PackedDataset(Documents([3, 3], unlabelled={1, 4, 5}), max_seq_len=8)
    assert rows_of(packed) == [([0, 1, 2, 3, 4, 5], [NONE, 2, NONE, NONE, NONE, NONE], [3, 3])]


def test_what_happens_to_a_document_longer_than_a_row_by_hand():
    """Cut: it ends there. Split: each part predicts the next one's first token."""
    documents = Documents([2, 7, 1])
    whole = {"max_seq_len": 3, "split_across_pack": False}
    truncated = PackedDataset(documents, long_samples="truncate", **whole)
    assert rows_of(truncated) == [
        ([0, 1], [1, NONE], [2]), ([2, 3, 4], [3, 4, NONE], [3]), ([9], [NONE], [1]),
    ]  # fmt: skip
    assert truncated.cut == (1, 4)
    split = PackedDataset(documents, long_samples="split", **whole)
    assert rows_of(split) == [
        ([0, 1], [1, NONE], [2]), ([2, 3, 4], [3, 4, 5], [3]), ([5, 6, 7], [6, 7, 8], [3]),
        ([8, 9], [NONE, NONE], [1, 1]),
    ]  # fmt: skip
    assert split.cut == (1, 0)
    alone = ShiftedDataset(documents, max_seq_len=3, long_samples="split")
    assert [alone[i]["tokens"] for i in range(len(alone))] == [
        [0, 1], [2, 3, 4], [5, 6, 7], [8], [9],
    ]  # fmt: skip
    assert alone[2]["labels"] == [6, 7, 8]
    assert alone.cut == (1, 0)
    short = ShiftedDataset(documents, max_seq_len=3)
    assert [(short[i]["tokens"], short[i]["cut"], short[i]["lost"]) for i in range(3)] == [
        ([0, 1], 0, 0), ([2, 3, 4], 1, 4), ([9], 0, 0),
    ]  # fmt: skip
    assert short[1]["labels"] == [3, 4, NONE]
    assert short.cut is None, "nobody has looked"


def test_split_across_pack_cuts_nothing_whatever_long_samples_says():
    for long_samples in ("truncate", "split"):
        packed = PackedDataset(Documents([2, 7]), max_seq_len=4, long_samples=long_samples)
        assert [t for tokens, _, _ in rows_of(packed) for t in tokens] == list(range(9))
        assert packed.cut == (0, 0)


@pytest.mark.parametrize("kind", [PackedDataset, ShiftedDataset])
def test_longer_samples_can_be_refused(kind):
    def read(lengths):
        dataset = kind(Documents(lengths), max_seq_len=8, long_samples="refuse", path="dataset_val")
        return [dataset[i] for i in range(len(dataset))]

    read([8, 8])
    with pytest.raises(InputError, match=(
        r"^dataset_val: sample 1 has 9 tokens, but max_seq_len is 8: raise max_seq_len, or set "
        r"long_samples to truncate or split$"
    )):  # fmt: skip
        read([3, 9])


@quick
@given(lengths=lengths_of_documents, size=row_lengths)
def test_split_documents_keep_every_token_and_label(lengths, size):
    """Packed without filling up, and unpacked: the same tokens, labels, and count of long ones."""
    packed = PackedDataset(
        Documents(lengths), max_seq_len=size, split_across_pack=False, long_samples="split"
    )
    alone = ShiftedDataset(Documents(lengths), max_seq_len=size, long_samples="split")
    parts = [-(-n // size) for n in lengths]
    assert len(alone) == sum(max(p, 1) for p in parts)
    assert [t for tokens, _, _ in rows_of(packed) for t in tokens] == list(range(sum(lengths)))
    assert [label for _, labels, _ in rows_of(packed) for label in labels] == [
        label for i in range(len(alone)) for label in alone[i]["labels"]
    ]
    assert [n for _, _, row in rows_of(packed) for n in row] == [
        min(size, n - at) for n in lengths for at in range(0, n, size)
    ]
    assert all(sum(row) <= size for _, _, row in rows_of(packed))
    assert packed.cut == alone.cut == (sum(p > 1 for p in parts), 0)


def test_nothing_but_empty_documents():
    assert len(PackedDataset(Documents([0, 0]), max_seq_len=4)) == 0
    empty = ShiftedDataset(Documents([0]), max_seq_len=4)[0]
    assert empty == {"tokens": [], "labels": [], "lengths": [0], "cut": 0, "lost": 0}


def test_one_document_a_sample():
    shifted = ShiftedDataset(Documents([3, 5], unlabelled={1}), max_seq_len=8)
    assert len(shifted) == 2
    assert shifted[0] == {
        "tokens": [0, 1, 2], "labels": [NONE, 2, NONE], "lengths": [3], "cut": 0, "lost": 0,
    }  # fmt: skip


class Broken(Documents):
    def __init__(self, sample):
        super().__init__([2, 2])
        self.sample = sample

    def __getitem__(self, index):
        if index == 1 and isinstance(self.sample, Exception):
            raise self.sample
        return self.sample if index == 1 else super().__getitem__(index)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (KeyError("text"), "sample 1 has no 'text'"),
        (ValueError("Two consecutive\nuser messages"), "sample 1 cannot be used: Two consecutive"),
        (TypeError("None is not a text"), "sample 1 cannot be used: None is not a text"),
        (UnboundLocalError("content"), "sample 1 cannot be used: content"),
        (ValueError(), "sample 1 cannot be used: ValueError"),
        ({"tokens": [1]}, r"sample 1 must hold 'tokens' and 'labels', but is \['tokens'\]"),
        ([1, 2], "sample 1 must hold 'tokens' and 'labels', but is list"),
        ({"tokens": [1], "labels": [1, 2]}, "sample 1 has 1 tokens, but 2 labels"),
    ],
)  # fmt: skip
def test_a_sample_that_cannot_be_read_is_one_sentence(sample, message):
    for read in (
        lambda d: PackedDataset(d, max_seq_len=4),
        lambda d: ShiftedDataset(d, max_seq_len=4)[1],
    ):
        with pytest.raises(InputError, match=f"^dataset: {message}") as caught:
            read(Broken(sample))
        assert "\n" not in str(caught.value)
