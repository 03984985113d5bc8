"""Rows of data sets larger than memory, one after the other, from a place that can be kept.

A stream is read in windows: so many documents are read, put in an order that depends on seed,
pass and window alone, and made into rows. Its place is where the window began and how many of its
rows were given. Every process goes through the same rows; one that is not its own costs nothing
but reading (packing needs the tokens of all).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, Protocol

from moe_builders.data.documents import read_document
from moe_builders.data.nodes import cause_of, no_samples
from moe_builders.data.order import pass_order, permutation
from moe_builders.data.packing import Packer, Row, document_rows
from moe_builders.data.rows import PackedDataset, ShiftedDataset
from moe_builders.errors import InputError

MakeRow = Callable[[], Row]  # the row is made when it is called
_BLOCK = 64  # draws of a mixture that are put in an order together


class RowSource(Protocol):
    """Rows one after the other."""

    def take(self) -> MakeRow | None:
        """The next row; None: there is no more."""
        ...

    def state(self) -> dict[str, Any]:
        """The place before the next row; values in it are never changed afterwards."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on at a place that ``state`` gave."""
        ...


class DocumentStream:
    """Rows of one streamed data set.

    Args:
        dataset: torchtune's, whose ``_data`` is a datasets.IterableDataset.
        max_seq_len: longest row.
        packed, split_across_pack: see ``Packer``.
        long_samples: "truncate", "split" or "refuse".
        seed, which: of the order; ``which`` is the number of the set in a list.
        shuffle: each window in an order of its own; False: as it is.
        window: documents of a window.
        passes: how often the data is gone through; None: without end.
        path, files: where in the config and from what, for messages.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        max_seq_len: int,
        packed: bool,
        split_across_pack: bool,
        long_samples: str,
        seed: int,
        which: int = 0,
        shuffle: bool,
        window: int,
        passes: int | None = 1,
        path: str = "dataset",
        files: str = "",
    ) -> None:
        self.dataset, self.packed, self.passes = dataset, packed, passes
        self.seed, self.which, self.shuffle, self.window = seed, which, shuffle, window
        self.path, self.files = path, files
        self._cutting: dict[str, Any] = {
            "max_seq_len": max_seq_len, "long_samples": long_samples,
            "split_across_pack": packed and split_across_pack,
        }  # fmt: skip
        self._one_row_each = not packed and long_samples != "split"
        self._packer = Packer(max_seq_len=max_seq_len, split_across_pack=split_across_pack)
        self._beginning = dataset._data.state_dict()
        self._pass = self._window = self._given = 0
        self._source, self._carry = self._beginning, self._packer.state()
        self._documents: Iterator[Any] | None = None
        self._rows: Iterator[MakeRow] | None = None
        self._ends = False  # whether the pass ends with this window
        self._rows_of_pass: int | None = None  # None: the pass did not begin here

    def take(self) -> MakeRow | None:
        """See ``RowSource``."""
        while self.passes is None or self._pass < self.passes:
            if self._rows is None:
                self._rows = self._open_window()
            row = next(self._rows, None)
            if row is not None:
                self._given += 1
                return row
            self._close_window()
        return None

    def state(self) -> dict[str, Any]:
        """See ``RowSource``."""
        return {"pass": self._pass, "window": self._window, "source": self._source,
                "carry": self._carry, "given": self._given}  # fmt: skip

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See ``RowSource``."""
        self._pass, self._window, self._given = state["pass"], state["window"], state["given"]
        self._source, self._carry = state["source"], state["carry"]
        self._packer.load_state(self._carry)
        self._documents = self._rows = self._rows_of_pass = None

    def _open_window(self) -> Iterator[MakeRow]:
        if self._documents is None:
            self.dataset._data.load_state_dict(self._source)
            self._documents = iter(self.dataset._data)
        if self._window == 0 and self._given == 0:
            self._rows_of_pass = 0
        documents = self._read(self._documents)
        self._ends = len(documents) < self.window
        rows = self._rows_of(documents)
        for _ in range(self._given):
            next(rows)
        return rows

    def _read(self, documents: Iterator[Any]) -> list[Any]:
        read: list[Any] = []
        try:
            read.extend(islice(documents, self.window))
        except Exception as error:  # each format's reader has its own errors
            number = self._window * self.window + len(read)
            where = f" from {self.files}" if self.files else ""
            raise InputError(
                f"{self.path} cannot be read{where} after sample {number}: {cause_of(error)}"
            ) from error
        return read

    def _rows_of(self, documents: Sequence[Any]) -> Iterator[MakeRow]:
        order: Sequence[int] = range(len(documents))
        if self.shuffle:
            key = [self._pass, self.which + 1, self._window]
            order = permutation(len(documents), seed=self.seed, key=key)
        first = self._window * self.window
        for at in order:
            make = partial(self._document, documents[at], first + at)
            if self._one_row_each:
                yield lambda make=make: make()[0]
                continue
            for document in make():
                for row in self._packer.add(document) if self.packed else [document]:
                    yield lambda row=row: row
        if self._ends and self.packed:
            for row in self._packer.flush():
                yield lambda row=row: row

    def _document(self, document: Any, number: int) -> list[Row]:
        where = f"{self.path}: sample {number}"
        tokens, labels = read_document(self.dataset, lambda: document, where)
        return document_rows(tokens, labels, where=where, **self._cutting)

    def _close_window(self) -> None:
        if self._rows_of_pass is not None:
            self._rows_of_pass += self._given
        if self._ends:
            if self._rows_of_pass == 0:
                raise no_samples(self.path, self.files)
            self._pass, self._window = self._pass + 1, 0
            self._source, self._documents = self._beginning, None
        else:
            self._window += 1
            self._source = self.dataset._data.state_dict()
        self._given, self._rows, self._carry = 0, None, self._packer.state()


class SizedSource:
    """Rows of a sized data set, pass after pass without end.

    Args:
        rows: the data set.
        seed, which: of the order; ``which`` is the number of the set in a list.
        shuffle: each pass in an order of its own; False: as it is.
    """

    def __init__(
        self, rows: PackedDataset | ShiftedDataset, *, seed: int, which: int, shuffle: bool
    ) -> None:
        self.rows, self.packed = rows, rows.packed
        self.seed, self.which, self.shuffle = seed, which, shuffle
        self._row = 0
        self._order: tuple[int, list[int]] = (-1, [])  # of which pass

    def take(self) -> MakeRow:
        """See ``RowSource``."""
        n = len(self.rows)
        number, at = divmod(self._row, n)
        if self._order[0] != number:
            order = pass_order(
                n, seed=self.seed, which=self.which, number=number, shuffle=self.shuffle
            )
            self._order = number, order
        self._row += 1
        return partial(self.rows.__getitem__, self._order[1][at])

    def state(self) -> dict[str, Any]:
        """See ``RowSource``."""
        return {"row": self._row}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See ``RowSource``."""
        self._row = state["row"]


class MixedSource:
    """Rows of several endless sources in proportion to weights, off by less than 1 row each.

    Draws are worked out 64 at a time, which are then put in an order of their own.

    Args:
        members: the sources.
        weights: of each, in any unit.
        seed: of the order.
        shuffle: False: evenly spread.
    """

    def __init__(
        self, members: Sequence[RowSource], weights: Sequence[float], *, seed: int, shuffle: bool
    ) -> None:
        self.members, self.seed, self.shuffle = list(members), seed, shuffle
        self.shares = [weight / sum(weights) for weight in weights]
        self._draws = 0
        self._given = [0] * len(self.members)  # rows of each before this block
        self._block: list[int] | None = None

    def take(self) -> MakeRow | None:
        """See ``RowSource``."""
        if self._block is None:
            self._block = self._draw_block()
        which = self._block[self._draws % _BLOCK]
        self._draws += 1
        if self._draws % _BLOCK == 0:
            self._given = [n + self._block.count(i) for i, n in enumerate(self._given)]
            self._block = None
        return self.members[which].take()

    def _draw_block(self) -> list[int]:
        block, given = [], list(self._given)
        first = sum(given)
        for draw in range(first + 1, first + _BLOCK + 1):
            owed = [share * draw - n for share, n in zip(self.shares, given, strict=True)]
            which = owed.index(max(owed))
            given[which] += 1
            block.append(which)
        if not self.shuffle:
            return block
        return [block[at] for at in permutation(_BLOCK, seed=self.seed, key=[first])]

    def state(self) -> dict[str, Any]:
        """See ``RowSource``."""
        return {"draws": self._draws, "given": self._given,
                "members": [member.state() for member in self.members]}  # fmt: skip

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See ``RowSource``."""
        self._draws, self._given, self._block = state["draws"], list(state["given"]), None
        for member, own in zip(self.members, state["members"], strict=True):
            member.load_state(own)


class Chain:
    """Rows of several sources, one source after the other; for validation, so without a place."""

    def __init__(self, members: Sequence[RowSource]) -> None:
        self.members = list(members)
        self._beginning = [member.state() for member in self.members]

    def take(self) -> MakeRow | None:
        """See ``RowSource``."""
        rows = (member.take() for member in self.members)
        return next((row for row in rows if row is not None), None)

    def state(self) -> dict[str, Any]:
        """Where it begins."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Begin again."""
        for member, own in zip(self.members, self._beginning, strict=True):
            member.load_state(own)
