"""4, 2, 1, then 3 processes, each going on where the others stopped: every row once, in order."""

import json
from itertools import islice

import pytest
from helpers_data import text_node, write_jsonl, write_tokenizer

from moe_builders.data.build import build_loader
from moe_builders.data.loader import Batching
from moe_builders.data.tokenizer import HFTokenizer

N = 97
SIZES = (4, 2, 1, 3)
SPLITS = {  # (batch_size, accumulation) of each in turn
    "8 rows a step as long as that goes": [(2, 1), (4, 1), (4, 2), (2, 1)],
    "batch_size as it was": [(2, 1)] * 4,
    "micro-batches": [(1, 2), (2, 2), (1, 3), (1, 2)],
}
KINDS = {
    "sized": [{}], "packed": [{"packed": True}], "stream": [{"streaming": True}],
    "packed stream": [{"streaming": True, "packed": True}],
    "mixed": [{"weight": 2}, {"weight": 1}],
    "packed across rows": [{"packed": True, "split_across_pack": True}],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    write_tokenizer(folder)
    for name in "ab":
        texts = [{"text": f"{name}{i} " + "ab " * (i * 7 % 5)} for i in range(N)]
        write_jsonl(folder / f"{name}.jsonl", texts)
    return folder


def _ranks(folder, kind, size, batch_size, accumulation, place):
    nodes = [text_node(folder / f"{name}.jsonl", **keys)
             for name, keys in zip("ab", KINDS[kind], strict=False)]  # fmt: skip
    ranks = [
        build_loader(
            nodes if len(nodes) > 1 else nodes[0], HFTokenizer(folder),
            Batching(batch_size=batch_size, accumulation=accumulation, rank=rank, size=size,
                     max_seq_len=16, pad_id=0),
            seed=3, shuffle=True, long_samples="truncate", shuffle_window=10, validation=False,
        )
        for rank in range(size)
    ]  # fmt: skip
    for rank in ranks if place is not None else ():
        assert rank.load_state_dict(json.loads(place)) == []
    return ranks


def _rows(ranks, count):
    """The rows of so many steps of all processes, in the order of the data; and the place then."""
    found = []
    steps = [rank.steps(epochs=1) for rank in ranks]
    for together in islice(zip(*steps, strict=True), count):
        for micro in zip(*together, strict=True):
            shares = [[tuple(row[mask].tolist()) for row, mask in
                       zip(batch.tokens, batch.mask, strict=True)] for batch in micro]  # fmt: skip
            found += [row for place in zip(*shares, strict=True) for row in place]
    places = {json.dumps(rank.state_dict()) for rank in ranks}
    assert len(places) == 1, "the same on all processes"
    for each in steps:
        each.close()
    return found, places.pop()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_once(folder, kind, split):
    straight, _ = _rows(_ranks(folder, kind, 1, 1, 1, None), None)
    assert len(straight) > 25
    if "packed" not in kind and kind != "mixed":
        assert len(set(straight)) == len(straight) == N
    found, place = [], None
    for number, (size, (batch_size, accumulation)) in enumerate(
        zip(SIZES, SPLITS[split], strict=True), start=1
    ):
        ranks = _ranks(folder, kind, size, batch_size, accumulation, place)
        rows, place = _rows(ranks, 1 if number < len(SIZES) else None)
        assert len(rows) >= size * batch_size * accumulation
        found += rows
    assert found == straight[: len(found)]
    left_out = len(straight) - len(found)
    assert left_out < size * batch_size * accumulation, "only what fills no step"
