"""Packed rows: every token once, no document beside itself, no label across a border."""

from itertools import pairwise

import pytest
import torch
from helpers import quick
from hypothesis import given
from hypothesis import strategies as st

from moe_builders.data.batch import collate
from moe_builders.data.packing import PackedDataset, ShiftedDataset
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


def test_a_document_that_may_not_be_split():
    documents = Documents([3, 9])
    with pytest.raises(InputError, match=r"dataset: sample 1 has 9 tokens, but a row holds 8: "):
        PackedDataset(documents, max_seq_len=8, split_across_pack=False)
    assert len(PackedDataset(documents, max_seq_len=8, split_across_pack=True)) == 2
    assert len(PackedDataset(Documents([8, 8]), max_seq_len=8, split_across_pack=False)) == 2


def test_nothing_but_empty_documents():
    assert len(PackedDataset(Documents([0, 0]), max_seq_len=4)) == 0
    assert ShiftedDataset(Documents([0]), max_seq_len=4)[0] == {
        "tokens": [], "labels": [], "lengths": [0],
    }  # fmt: skip


def test_one_document_a_sample():
    shifted = ShiftedDataset(Documents([3, 5], unlabelled={1}), max_seq_len=4, path="dataset_val")
    assert len(shifted) == 2
    assert shifted[0] == {"tokens": [0, 1, 2], "labels": [NONE, 2, NONE], "lengths": [3]}
    with pytest.raises(InputError, match="dataset_val: sample 1 has 5 tokens, but max_seq_len is"):
        shifted[1]


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
