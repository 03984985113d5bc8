"""Batches: shifted labels, and what is real known from lengths alone.

Letters: b rows · s positions.
"""

import dataclasses

import pytest
import torch
from helpers import quick
from hypothesis import given
from hypothesis import strategies as st

from moe_builders.data.batch import Batch, collate, shift_labels
from moe_builders.losses import IGNORE_INDEX as NONE

INT32 = torch.int32
EOS = PAD = 7  # one id for both: only lengths tell them apart


def document(*tokens):
    return {"tokens": list(tokens), "labels": shift_labels(tokens), "lengths": [len(tokens)]}


def row(*documents):
    """Several documents of token ids as one packed sample."""
    return {
        "tokens": [token for tokens in documents for token in tokens],
        "labels": [label for tokens in documents for label in shift_labels(tokens)],
        "lengths": [len(tokens) for tokens in documents],
    }


def test_a_label_is_the_next_token():
    assert shift_labels([1, 2, 3]) == [2, 3, NONE]
    assert shift_labels([NONE, NONE, 5, 6]) == [NONE, 5, 6, NONE]
    assert shift_labels([4]) == [NONE]
    assert shift_labels([]) == []


def test_two_documents_by_hand():
    batch = collate([document(5, 7, 6, 7), document(1, 2)], pad_id=PAD)
    assert batch.tokens.tolist() == [[5, 7, 6, 7], [1, 2, 7, 7]]
    assert batch.labels.tolist() == [[7, 6, 7, NONE], [2, NONE, NONE, NONE]]
    assert batch.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.positions.tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]]
    assert batch.sequence_ids.tolist() == [[0, 0, 0, 0], [1, 1, 2, 2]]
    assert (batch.num_labels, batch.num_real) == (4, 6)
    assert batch.attention_mask is None, "padding stands behind: causal attention is enough"


def test_an_eos_inside_a_document_is_a_real_token_and_a_label():
    """pad_id == eos_id: comparing ids would mask the end of every document."""
    batch = collate([document(EOS, 5, EOS, EOS)], pad_id=PAD, length=6)
    assert batch.mask.tolist() == [[True] * 4 + [False] * 2]
    assert batch.labels.tolist() == [[5, EOS, EOS, NONE, NONE, NONE]]
    assert batch.info.mask.tolist() == batch.mask[0].tolist()


def test_packed_rows_by_hand():
    batch = collate([row([1, 2], [3], [4, 5]), row([6])], pad_id=0, packed=True, length=6)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 0], [6, 0, 0, 0, 0, 0]]
    assert batch.labels.tolist() == [[2, NONE, NONE, 5, NONE, NONE], [NONE] * 6]
    assert batch.positions.tolist() == [[0, 1, 0, 0, 1, 0], [0, 0, 1, 2, 3, 4]]
    assert batch.sequence_ids.tolist() == [[0, 0, 1, 2, 2, 3], [4, 5, 5, 5, 5, 5]]
    seen = batch.attention_mask
    assert seen is not None
    assert seen.shape == (2, 6, 6)
    assert seen[0].long().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_a_model_gets_documents_if_it_says_that_it_takes_them():
    class Model(torch.nn.Module):
        takes_documents = True

    batch = collate([row([1, 2], [3])], pad_id=0, packed=True, length=5)
    documents = batch.attention_for(Model())
    assert documents is batch.documents
    assert documents.ends.tolist() == [2, 3, 5, 5, 5]
    assert documents.counts.tolist() == [3, 2]
    assert torch.equal(batch.attention_for(torch.nn.Module()), batch.attention_mask)
    for model in (Model(), torch.nn.Module()):
        assert collate([document(1, 2)], pad_id=0).attention_for(model) is None


def test_rows_without_a_sample_are_all_padding():
    batch = collate([None, document(1, 2), None], pad_id=3)
    assert batch.tokens.tolist() == [[3, 3], [1, 2], [3, 3]]
    assert batch.mask.tolist() == [[False] * 2, [True] * 2, [False] * 2]
    assert batch.sequence_ids.tolist() == [[0, 0], [1, 1], [2, 2]]
    assert (batch.num_labels, batch.num_real) == (1, 2)
    empty = collate([None, None], pad_id=3)
    assert empty.tokens.shape == (2, 1)
    assert (empty.num_labels, empty.num_real) == (0, 0)


def test_an_empty_document_has_no_place_and_no_number():
    batch = collate([row([1], [], [2])], pad_id=0)
    assert batch.sequence_ids.tolist() == [[0, 1]]
    assert batch.positions.tolist() == [[0, 0]]


documents = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), max_size=4)


@quick
@given(rows=st.lists(documents, min_size=1, max_size=4), extra=st.integers(0, 3))
def test_numbers_positions_and_masks_of_any_batch(rows, extra):
    samples = [row(*documents) if documents else None for documents in rows]
    longest = max(1, *(sum(map(len, documents)) for documents in rows))
    batch = collate(samples, pad_id=PAD, packed=True, length=longest + extra)
    numbers = set()
    for i, documents in enumerate(rows):
        start = 0
        for tokens in documents:
            here = slice(start, start + len(tokens))
            assert batch.tokens[i, here].tolist() == tokens
            assert batch.labels[i, here].tolist() == [*tokens[1:], NONE]
            assert batch.positions[i, here].tolist() == list(range(len(tokens)))
            (number,) = set(batch.sequence_ids[i, here].tolist())
            assert number not in numbers
            numbers.add(number)
            start += len(tokens)
        assert batch.mask[i].tolist() == [True] * start + [False] * (longest + extra - start)
        assert set(batch.labels[i, start:].tolist()) <= {NONE}
        behind = set(batch.sequence_ids[i, start:].tolist())
        assert len(behind) <= 1
        assert not behind & numbers
        numbers |= behind
    assert max(numbers) < batch.tokens.numel()
    attends = batch.attention_mask
    assert attends is not None
    same = batch.sequence_ids[:, :, None] == batch.sequence_ids[:, None, :]
    assert torch.equal(attends, same.tril())
    shape = {"rows": len(rows), "positions": longest + extra}
    assert torch.equal(batch.documents.mask(**shape), attends)
    lengths = batch.sequence_ids.flatten().bincount()
    assert batch.documents.counts.tolist() == [len(lengths), lengths.max()]


def test_tensors_and_numpy_numbers_are_welcome():
    import numpy

    sample = {"tokens": torch.tensor([1, 2]), "labels": [numpy.int64(2), NONE], "lengths": [2]}
    batch = collate([sample], pad_id=0)
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.tokens.tolist() == [[1, 2]]


@pytest.mark.parametrize("packed", [False, True])
def test_moving_keeps_everything(packed):
    batch = collate([document(1, 2, 3)], pad_id=0, packed=packed, length=4)
    moved = batch.to(torch.device("meta"))
    if packed:
        assert batch.documents.ends.tolist() == [3, 4, 4, 4]
        assert moved.documents.counts.tolist() == [2, 3]  # stays on the host
        assert (moved.documents.ends.device.type, moved.documents.ends.dtype) == ("meta", INT32)
    for field in dataclasses.fields(Batch):
        if packed and field.name == "documents":
            continue
        here, there = getattr(batch, field.name), getattr(moved, field.name)
        if isinstance(here, torch.Tensor):
            assert (there.shape, there.dtype, there.device.type) == (here.shape, here.dtype, "meta")
        else:
            assert there == here
    assert batch.info.sequence_ids.shape == batch.info.input_ids.shape == (4,)


def test_what_was_cut_is_counted_over_all_rows():
    row = {"tokens": [1], "labels": [2], "lengths": [1]}
    batch = collate([row | {"cut": 1, "lost": 4}, None, row, row | {"cut": 2, "lost": 3}], pad_id=0)
    assert (batch.num_cut, batch.num_lost) == (3, 7)
    moved = batch.to(torch.device("cpu"))
    assert (moved.num_cut, moved.num_lost, moved.packed) == (3, 7, False)
