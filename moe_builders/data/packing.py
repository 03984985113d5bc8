"""Documents as rows of at most max_seq_len tokens: cut, split or refused, and packed together.

A row is {"tokens", "labels" (the next token), "lengths" (of its documents), "cut" (how many
documents that begin here were longer than max_seq_len), "lost" (tokens of those left out)}.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from moe_builders.data.batch import shift_labels
from moe_builders.errors import InputError

Row = dict[str, Any]


def document_rows(
    tokens: Sequence[int],
    labels: Sequence[int],
    *,
    max_seq_len: int,
    long_samples: str,
    split_across_pack: bool = False,
    where: str,
) -> list[Row]:
    """One document as rows of its own: one, or several where it is split.

    Args:
        tokens, labels: as torchtune leaves them: a label is the token itself.
        max_seq_len: longest row.
        long_samples: what happens to a longer document. "truncate": it ends there. "split": it
            goes on in further rows, each part still predicting the first token of the next.
            "refuse": an error.
        split_across_pack: the packer splits documents wherever a row ends, so none is cut here.
        where: the document's name in messages.

    Raises:
        InputError: a longer document, with "refuse".
    """
    n = len(tokens)
    too_long = n > max_seq_len
    if too_long and long_samples == "refuse":
        raise InputError(
            f"{where} has {n} tokens, but max_seq_len is {max_seq_len}: raise max_seq_len, or set "
            "long_samples to truncate or split"
        )
    if split_across_pack or not too_long:
        return [_row(list(tokens), shift_labels(labels), cut=0, lost=0)]
    if long_samples == "truncate":
        kept, cut_labels = list(tokens[:max_seq_len]), shift_labels(labels[:max_seq_len])
        return [_row(kept, cut_labels, cut=1, lost=n - max_seq_len)]
    shifted = shift_labels(labels)
    return [
        _row(list(tokens[at : at + max_seq_len]), shifted[at : at + max_seq_len],
             cut=int(at == 0), lost=0)
        for at in range(0, n, max_seq_len)
    ]  # fmt: skip


def _row(tokens: list[int], labels: list[int], *, cut: int, lost: int) -> Row:
    return {"tokens": tokens, "labels": labels, "lengths": [len(tokens)], "cut": cut, "lost": lost}


class Packer:
    """Builds rows out of documents that follow each other in order; ``lengths`` keep them apart.

    Labels are shifted before packing, so a document never predicts its neighbour's first token,
    and a document that is split still predicts the first token of its next part.

    Args:
        max_seq_len: length of a row.
        split_across_pack: fill each row to the end and go on with the rest of the document in the
            next row; False: a document that does not fit starts a new row.
    """

    def __init__(self, *, max_seq_len: int, split_across_pack: bool) -> None:
        self.max_seq_len, self.split_across_pack = max_seq_len, split_across_pack
        self._open = _empty()

    def add(self, document: Row) -> list[Row]:
        """Put a document (from ``document_rows``) behind the others; returns rows now full."""
        finished: list[Row] = []
        start, n = 0, len(document["tokens"])
        assert self.split_across_pack or n <= self.max_seq_len
        while start < n:
            room = self.max_seq_len - len(self._open["tokens"])
            if room == 0 or (not self.split_across_pack and n > room):
                finished += self.flush()
                continue
            end = min(start + room, n)
            self._open["tokens"] += document["tokens"][start:end]
            self._open["labels"] += document["labels"][start:end]
            self._open["lengths"].append(end - start)
            start = end
        # one that is cut is never longer than a row, so it begins where it ends
        self._open["cut"] += document["cut"]
        self._open["lost"] += document["lost"]
        return finished

    def flush(self) -> list[Row]:
        """The row that is not full yet, as it is; [] when there is none."""
        row, self._open = self._open, _empty()
        if not row["tokens"]:
            return []
        # as tensors: a list of ints takes ten times the memory
        packed = {key: torch.tensor(row[key], dtype=torch.int32) for key in ("tokens", "labels")}
        return [row | packed]

    def state(self) -> Row:
        """The row that is not full yet, as plain numbers."""
        return {k: list(v) if isinstance(v, list) else v for k, v in self._open.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on with a row that ``state`` gave."""
        self._open = {k: list(v) if isinstance(v, list) else v for k, v in state.items()}


def _empty() -> Row:
    return {"tokens": [], "labels": [], "lengths": [], "cut": 0, "lost": 0}
