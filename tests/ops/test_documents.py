"""Where documents end: masks, chunks and numbers, by loops over tokens.

Letters: t tokens · x documents.
"""

import torch
from helpers import quick
from hypothesis import given
from hypothesis import strategies as st

from moe_builders.ops.documents import Documents, document_of_tokens, documents_of, runs, whole_rows

lengths_of = st.lists(st.integers(1, 9), min_size=1, max_size=7)


@quick
@given(lengths=lengths_of)
def test_numbers_and_mask(lengths):
    documents, t = documents_of(lengths), sum(lengths)
    assert documents.ends.dtype == torch.int32
    assert documents.ends.shape == (t,), "no shape tells how many documents there are"
    assert documents.counts.tolist() == [len(lengths), max(lengths)]
    numbers = [number for number, length in enumerate(lengths) for _ in range(length)]
    assert document_of_tokens(documents.ends, t).tolist() == numbers
    (mask,) = documents.mask(rows=1, positions=t).tolist()
    assert mask == [[numbers[i] == numbers[j] and j <= i for j in range(t)] for i in range(t)]


@quick
@given(lengths=lengths_of, chunk=st.integers(1, 10))
def test_chunks_are_shorter_documents(lengths, chunk):
    documents, t = documents_of(lengths), sum(lengths)
    cut = [min(chunk, n - at) for n in lengths for at in range(0, n, chunk)]
    ends, longest = runs(documents.ends, documents.counts, num_tokens=t, chunk=chunk)
    found = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    assert found == cut + [0] * (len(found) - len(cut))
    assert ends.dtype == torch.int32
    assert longest >= max(cut)
    assert longest == min(chunk, max(lengths)), "no kernel is asked for more than there is"


def test_whole_rows():
    documents = whole_rows(3, 4, torch.device("cpu"))
    ends, longest = runs(documents.ends, documents.counts, num_tokens=12, chunk=None)
    assert (ends.tolist(), longest) == ([4, 8, 12], 4)
    assert torch.equal(
        documents.mask(rows=3, positions=4), torch.ones(3, 4, 4, dtype=torch.bool).tril()
    )


def test_what_the_host_is_asked_for_stays_there():
    moved = documents_of([2, 3]).changed(lambda tensor: tensor.to("meta"))
    assert isinstance(moved, Documents)
    assert (moved.ends.device.type, moved.counts.device.type) == ("meta", "cpu")
