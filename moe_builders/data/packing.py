"""Samples for ``collate``: labels shifted, and optionally several documents packed in a row."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset

from moe_builders.data.batch import shift_labels
from moe_builders.errors import InputError


class SizedDataset(Protocol):
    """A map-style dataset whose samples hold torchtune's "tokens" and "labels"."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class ShiftedDataset(Dataset):
    """One document a sample: labels become the next token, the length is noted.

    Args:
        dataset: torchtune samples.
        max_seq_len: longer samples are refused.
    """

    def __init__(self, dataset: SizedDataset, *, max_seq_len: int) -> None:
        self.dataset, self.max_seq_len = dataset, max_seq_len

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.dataset[index]
        tokens = sample["tokens"]
        if len(tokens) > self.max_seq_len:
            raise InputError(
                f"sample {index} has {len(tokens)} tokens, but max_seq_len is {self.max_seq_len}: "
                "raise max_seq_len, or cut the sample"
            )
        labels = shift_labels(sample["labels"])
        return {"tokens": tokens, "labels": labels, "lengths": [len(tokens)]}


class PackedDataset(Dataset):
    """Several documents a sample, kept apart by ``lengths``: attention, positions, labels.

    Documents follow each other in order. Labels are shifted before packing, so a document never
    predicts its neighbour's first token, and a document that is split still predicts the first
    token of its next part.

    Args:
        dataset: torchtune samples; read once, at the start.
        max_seq_len: length of a row.
        split_across_pack: fill each row to the end and go on with the rest of the document in the
            next row; False: a document that does not fit starts a new row.

    Raises:
        InputError: a document longer than a row that may not be split.
    """

    def __init__(
        self, dataset: SizedDataset, *, max_seq_len: int, split_across_pack: bool = True
    ) -> None:
        self.max_seq_len = max_seq_len
        self.rows: list[dict[str, Any]] = []
        row: dict[str, list[int]] = {"tokens": [], "labels": [], "lengths": []}
        for index in range(len(dataset)):
            sample = dataset[index]
            tokens, labels = list(sample["tokens"]), shift_labels(sample["labels"])
            if not split_across_pack and len(tokens) > max_seq_len:
                raise InputError(
                    f"sample {index} has {len(tokens)} tokens, but a row holds {max_seq_len}: "
                    "raise max_seq_len, or set dataset.split_across_pack to true"
                )
            start = 0
            while start < len(tokens):
                room = max_seq_len - len(row["tokens"])
                if room == 0 or (not split_across_pack and len(tokens) > room):
                    row = self._close(row)
                    continue
                end = min(start + room, len(tokens))
                row["tokens"] += tokens[start:end]
                row["labels"] += labels[start:end]
                row["lengths"].append(end - start)
                start = end
        if row["tokens"]:
            self._close(row)

    def _close(self, row: dict[str, list[int]]) -> dict[str, list[int]]:
        """Keep a full row (as tensors: a list of ints takes ten times the memory)."""
        self.rows.append({
            "tokens": torch.tensor(row["tokens"], dtype=torch.int32),
            "labels": torch.tensor(row["labels"], dtype=torch.int32),
            "lengths": row["lengths"],
        })  # fmt: skip
        return {"tokens": [], "labels": [], "lengths": []}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]
