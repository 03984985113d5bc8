"""Sized data sets of rows: one document a row, or several packed together."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

from torch.utils.data import Dataset
from tqdm import tqdm

from moe_builders.data.documents import read_sample
from moe_builders.data.order import MixedOrder, Order
from moe_builders.data.packing import Packer, Row, document_rows


class SizedDataset(Protocol):
    """A map-style dataset whose samples hold torchtune's "tokens" and "labels"."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class ShiftedDataset(Dataset):
    """One document a row: labels become the next token, the length is noted.

    Args:
        dataset: torchtune samples; read when they are asked for, and once at the start where
            long ones are split, since that gives more rows.
        max_seq_len: longest row.
        long_samples: what happens to longer ones: "truncate", "split" or "refuse".
        path: where in the config the data set stands, for messages.
        show: draw a progress bar where all are read at the start.
    """

    packed = False

    def __init__(
        self,
        dataset: SizedDataset,
        *,
        max_seq_len: int,
        long_samples: str = "truncate",
        path: str = "dataset",
        show: bool = False,
    ) -> None:
        self.dataset, self.max_seq_len, self.path = dataset, max_seq_len, path
        self.long_samples = long_samples
        self.cut: tuple[int, int] | None = None  # (samples cut, tokens lost): nobody knows yet
        self._ends: list[int] | None = None
        if long_samples == "split":
            numbers = _progress(len(dataset), f"reading {path}", show=show)
            sizes = [len(self._rows_of(index)) for index in numbers]
            self._ends = list(accumulate(sizes))
            self.cut = sum(size > 1 for size in sizes), 0

    def __len__(self) -> int:
        return len(self.dataset) if self._ends is None else (self._ends or [0])[-1]

    def __getitem__(self, index: int) -> Row:
        if self._ends is None:
            return self._rows_of(index)[0]
        sample = bisect_right(self._ends, index)
        return self._rows_of(sample)[index - self._ends[sample]]

    def _rows_of(self, index: int) -> list[Row]:
        tokens, labels = read_sample(self.dataset, index, self.path)
        return document_rows(
            tokens, labels, max_seq_len=self.max_seq_len, long_samples=self.long_samples,
            where=f"{self.path}: sample {index}",
        )  # fmt: skip


class PackedDataset(Dataset):
    """Several documents a row, kept apart by ``lengths``: attention, positions, labels.

    Args:
        dataset: torchtune samples; read once, at the start.
        max_seq_len: length of a row.
        split_across_pack: see ``Packer``; True: no sample is ever cut.
        long_samples: what happens to longer ones: "truncate", "split" or "refuse".
        path: where in the config the data set stands, for messages.
        show: draw a progress bar while the documents are read.

    Raises:
        InputError: a document longer than a row, with "refuse".
    """

    packed = True

    def __init__(
        self,
        dataset: SizedDataset,
        *,
        max_seq_len: int,
        split_across_pack: bool = True,
        long_samples: str = "truncate",
        path: str = "dataset",
        show: bool = False,
    ) -> None:
        packer = Packer(max_seq_len=max_seq_len, split_across_pack=split_across_pack)
        self.rows: list[Row] = []
        for index in _progress(len(dataset), f"packing {path}", show=show):
            tokens, labels = read_sample(dataset, index, path)
            for document in document_rows(
                tokens, labels, max_seq_len=max_seq_len, long_samples=long_samples,
                split_across_pack=split_across_pack, where=f"{path}: sample {index}",
            ):  # fmt: skip
                self.rows += packer.add(document)
        self.rows += packer.flush()
        self.cut = sum(row["cut"] for row in self.rows), sum(row["lost"] for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


def _progress(count: int, text: str, *, show: bool) -> Iterator[int]:
    return iter(tqdm(range(count), desc=text, disable=not show, leave=False, delay=2))


class MixedDataset(Dataset):
    """Several sets' rows, numbered through; an epoch takes them in proportion to weights.

    Args:
        parts: rows of each set, all packed or none.
        weights: of each set, in any unit.
    """

    def __init__(
        self, parts: Sequence[PackedDataset | ShiftedDataset], weights: Sequence[float]
    ) -> None:
        self.parts, self.weights, self.packed = list(parts), list(weights), parts[0].packed
        self._ends = list(accumulate(map(len, parts)))
        known = [part.cut for part in parts if part.cut is not None]
        whole = len(known) == len(parts)
        self.cut = (sum(c for c, _ in known), sum(n for _, n in known)) if whole else None

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Row:
        which = bisect_right(self._ends, index)
        return self.parts[which][index - self._ends[which] + len(self.parts[which])]


def order_of(
    dataset: PackedDataset | ShiftedDataset | MixedDataset, *, seed: int, shuffle: bool
) -> Order | MixedOrder:
    """The order in which epochs take the rows of a data set."""
    if not isinstance(dataset, MixedDataset):
        return Order(num_rows=len(dataset), seed=seed, shuffle=shuffle)
    return MixedOrder(
        lengths=[len(part) for part in dataset.parts], weights=dataset.weights, seed=seed,
        shuffle=shuffle,
    )  # fmt: skip
