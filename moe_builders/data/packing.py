"""Samples for ``collate``: labels shifted, and optionally several documents packed in a row."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from moe_builders.data.batch import shift_labels
from moe_builders.errors import InputError
from moe_builders.instantiate import first_line


class SizedDataset(Protocol):
    """A map-style dataset whose samples hold torchtune's "tokens" and "labels"."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


def read_sample(dataset: SizedDataset, index: int, path: str) -> tuple[list[int], list[int]]:
    """(tokens, labels) of one sample, as torchtune leaves them: a label is the token itself.

    Args:
        dataset: torchtune samples.
        index: which.
        path: where in the config the data set stands, for messages.

    Raises:
        InputError: a row that the data set's own transforms cannot read, or not such a sample.
    """
    where = f"{path}: sample {index}"
    try:
        sample = dataset[index]
    except KeyError as error:
        columns = getattr(getattr(dataset, "_data", None), "column_names", None)
        there = f"; its columns are {', '.join(columns)}" if columns else ""
        raise InputError(f"{where} has no {first_line(error)}{there}") from error
    except (ValueError, TypeError, LookupError, AttributeError, AssertionError, NameError) as error:
        raise InputError(f"{where} cannot be used: {first_line(error)}") from error
    if not isinstance(sample, Mapping) or not {"tokens", "labels"} <= set(sample):
        found = sorted(sample) if isinstance(sample, Mapping) else type(sample).__name__
        raise InputError(f"{where} must hold 'tokens' and 'labels', but is {found}")
    tokens, labels = list(sample["tokens"]), list(sample["labels"])
    if len(tokens) != len(labels):
        raise InputError(f"{where} has {len(tokens)} tokens, but {len(labels)} labels")
    return tokens, labels


class ShiftedDataset(Dataset):
    """One document a sample: labels become the next token, the length is noted.

    Args:
        dataset: torchtune samples.
        max_seq_len: longer samples are refused.
        path: where in the config the data set stands, for messages.
    """

    def __init__(self, dataset: SizedDataset, *, max_seq_len: int, path: str = "dataset") -> None:
        self.dataset, self.max_seq_len, self.path = dataset, max_seq_len, path

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens, labels = read_sample(self.dataset, index, self.path)
        if len(tokens) > self.max_seq_len:
            raise InputError(
                f"{self.path}: sample {index} has {len(tokens)} tokens, but max_seq_len is "
                f"{self.max_seq_len}: raise max_seq_len, or cut the sample"
            )
        return {"tokens": tokens, "labels": shift_labels(labels), "lengths": [len(tokens)]}


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
        path: where in the config the data set stands, for messages.
        show: draw a progress bar while the documents are read.

    Raises:
        InputError: a document longer than a row that may not be split.
    """

    def __init__(
        self,
        dataset: SizedDataset,
        *,
        max_seq_len: int,
        split_across_pack: bool = True,
        path: str = "dataset",
        show: bool = False,
    ) -> None:
        self.max_seq_len = max_seq_len
        self.rows: list[dict[str, Any]] = []
        row: dict[str, list[int]] = {"tokens": [], "labels": [], "lengths": []}
        samples = tqdm(
            range(len(dataset)), desc=f"packing {path}", disable=not show, leave=False, delay=2
        )
        for index in samples:
            tokens, labels = read_sample(dataset, index, path)
            labels = shift_labels(labels)
            if not split_across_pack and len(tokens) > max_seq_len:
                raise InputError(
                    f"{path}: sample {index} has {len(tokens)} tokens, but a row holds "
                    f"{max_seq_len}: raise max_seq_len, or set split_across_pack to true"
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
