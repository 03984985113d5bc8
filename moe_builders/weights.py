"""A checkpoint layout as data: rows that say where each tensor on disk lives in the model.

A family's layout is a tuple of rows. A row names a tensor on disk and a parameter of ours, with
placeholders: ``{l}`` a layer number; in a ``Stack`` also ``{e}``, an expert number, and
``{gate,up}``, alternatives that stand one after the other in the parameter. From the rows and a
model's shapes comes the plan, a list of pieces, and from the plan come import, export and the
completeness check.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from moe_builders.pieces import (
    Piece,
    Shape,
    interleaved,
    split,
    stacked,
    tiled,
    transposed,
    unsqueezed,
    whole,
)


@dataclass(frozen=True)
class Rename:
    """One tensor on disk is one parameter of ours, same shape."""

    disk: str
    ours: str


@dataclass(frozen=True)
class Unsqueeze:
    """A parameter [...] is [1, ...] on disk."""

    disk: str
    ours: str


@dataclass(frozen=True)
class Transpose:
    """A parameter [..., a, b] is [..., b, a] on disk."""

    disk: str
    ours: str


@dataclass(frozen=True)
class Interleave:
    """First and second half of a parameter's second dim (gate rows, up rows) alternate on disk.

    Attributes:
        transposed: the last two dims are swapped on disk, as with ``Transpose``.
    """

    disk: str
    ours: str
    transposed: bool = False


@dataclass(frozen=True)
class Split:
    """One tensor on disk is several parameters of ours, one after the other along its first dim."""

    disk: str
    ours: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(set(self.ours)) < len(self.ours):
            raise ValueError(f"{self} names a parameter twice")


@dataclass(frozen=True)
class Stack:
    """Many tensors on disk are one parameter: expert ``{e}`` is its first dim, alternatives
    ``{a,b}`` follow each other along its second."""

    disk: str
    ours: str


@dataclass(frozen=True)
class Copy:
    """A second name on disk of a parameter that another row fills: an output that is the embedding.

    A folder may lack it; one that has it must hold the same values and gets it back on export. It
    counts for nothing where another row fills a parameter from that name.
    """

    disk: str
    ours: str


@dataclass(frozen=True)
class PassThrough:
    """Tensors on disk that the model has no place for; an export carries them over untrained.

    Attributes:
        disk: their names; ``{*}`` stands for any text.
        beyond: only where ``{l}`` is more than in every parameter whose name begins like this, so
            ``PassThrough("model.layers.{l}.{*}", beyond="layers.{l}.")`` is what comes after the
            last layer, and nothing inside one.
    """

    disk: str
    beyond: str | None = None

    def __post_init__(self) -> None:
        if self.beyond is not None and not ("{l}" in self.disk and "{l}" in self.beyond):
            raise ValueError(f"{self} compares layer numbers: both names need {{l}}")


Row = Rename | Unsqueeze | Transpose | Interleave | Split | Stack | Copy | PassThrough


def make_plan(rows: Iterable[Row], shapes: Mapping[str, Sequence[int]]) -> list[Piece]:
    """Expand rows against a model's parameters.

    Args:
        rows: the layout; rows that match no parameter (an optional bias) are skipped.
        shapes: global shape of each parameter and persistent buffer.

    Returns:
        Pieces that cover every parameter and every tensor on disk exactly once, then copies.

    Raises:
        ValueError: a parameter that no row or more than one row fills or that a row cannot cut, a
            tensor on disk that is used twice (mistakes in the rows); all with their names.
    """
    rows, shapes = tuple(rows), {name: tuple(shape) for name, shape in shapes.items()}
    _beyond(rows, shapes)
    pieces: dict[str, list[Piece]] = {name: [] for name in shapes}
    copies: dict[str, Piece] = {}
    for row in rows:
        for found in _expand(row, shapes):
            if isinstance(row, Copy):
                if found[0].disk in copies:
                    raise ValueError(f"{found[0].disk} is a copy twice, the last time by {row}")
                copies[found[0].disk] = found[0]
                continue
            for name in dict.fromkeys(piece.ours for piece in found):
                if pieces[name]:
                    raise ValueError(f"{name} is filled by more than one row, the last one {row}")
            for piece in found:
                pieces[piece.ours].append(piece)
    unfilled = [name for name, found in pieces.items() if not found]
    if unfilled:
        raise ValueError(f"no row fills {', '.join(unfilled)}")
    plan = [piece for found in pieces.values() for piece in found]
    used = _check_disk(plan)
    return [*plan, *(copy for name, copy in copies.items() if name not in used)]


def carried_names(
    rows: Iterable[Row], shapes: Mapping[str, Sequence[int]], names: Iterable[str]
) -> list[str]:
    """Those tensors on disk that a model has no place for and an export carries over untrained.

    Args:
        rows: the layout.
        shapes: of the model's parameters and persistent buffers, by name.
        names: of tensors on disk.
    """
    limits = _beyond(rows, shapes)

    def carried(name: str) -> bool:
        matches = ((pattern.fullmatch(name), limit) for pattern, limit in limits)
        return any(
            match and (limit is None or int(match.group("l")) > limit) for match, limit in matches
        )

    return [name for name in names if carried(name)]


def own_rows(names: Iterable[str]) -> tuple[Row, ...]:
    """The layout of a model that has none: every tensor under our own name."""
    return tuple(Rename(name, name) for name in names)


def _beyond(rows: Iterable[Row], shapes: Iterable[str]) -> list[tuple[re.Pattern[str], int | None]]:
    """Of each PassThrough row its pattern, and the layer number it starts after."""
    found = []
    for row in rows:
        if not isinstance(row, PassThrough):
            continue
        limit = None
        if row.beyond is not None:
            inside = _pattern(row.beyond + "{*}")
            layers = [int(match.group("l")) for match in map(inside.fullmatch, shapes) if match]
            if not layers:  # a misspelt one would let everything pass
                raise ValueError(f"{row} needs parameters whose names begin like {row.beyond}")
            limit = max(layers)
        found.append((_pattern(row.disk), limit))
    return found


def _expand(row: Row, shapes: Mapping[str, Shape]) -> Iterator[list[Piece]]:
    """The pieces of a row, a list for each place in the model that it matches."""
    if isinstance(row, PassThrough):
        return
    templates = row.ours if isinstance(row, Split) else (row.ours,)
    pattern = _pattern(templates[0])
    for name in shapes:
        match = pattern.fullmatch(name)
        if match is None:
            continue
        numbers = match.groupdict()
        names = [_fill(template, numbers) for template in templates]
        lacking = [other for other in names if other not in shapes]
        if lacking:
            raise ValueError(f"{row} finds {name}, but the model has no {', '.join(lacking)}")
        try:
            found = _cut(row, _fill(row.disk, numbers), {name: shapes[name] for name in names})
        except ValueError as error:
            raise ValueError(f"{error} ({row})") from error
        still_open = [piece.disk for piece in found if "{" in piece.disk]
        if still_open:
            raise ValueError(f"{row} does not say what {still_open[0]} is for {name}")
        yield found


def _cut(row: Row, disk: str, shapes: Mapping[str, Shape]) -> list[Piece]:
    """The pieces of one match; ``shapes`` has the parameters that it fills, in order."""
    name, shape = next(iter(shapes.items()))
    match row:
        case Split():
            return split(disk, shapes)
        case Stack():
            return stacked(_alternatives(disk), name, shape)
        case Interleave():
            return interleaved(disk, name, shape, swapped=row.transposed)
        case Transpose():
            return [transposed(disk, name, shape)]
        case Unsqueeze():
            return [unsqueezed(disk, name, shape)]
        case _:
            return [whole(disk, name, shape, copy=isinstance(row, Copy))]


def _check_disk(plan: Iterable[Piece]) -> set[str]:
    """The names on disk, each of whose tensors must be covered exactly once."""
    by_disk: dict[str, list[Piece]] = defaultdict(list)
    for piece in plan:
        by_disk[piece.disk].append(piece)
    for name, pieces in by_disk.items():
        if len(pieces) > 1 and not tiled(pieces):
            ours = ", ".join(dict.fromkeys(piece.ours for piece in pieces))
            raise ValueError(f"{name} is not covered exactly once, but filled from {ours}")
    return set(by_disk)


def _alternatives(template: str) -> list[str]:
    """Of "a.{b,c}.d" a.b.d and a.c.d."""
    match = re.search(r"\{(\w+(?:,\w+)+)\}", template)
    if match is None:
        return [template]
    return [template.replace(match.group(0), word) for word in match.group(1).split(",")]


def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+|\*)\}", template)
    literal = (re.escape(part) for part in parts[::2])
    groups = [".*" if name == "*" else f"(?P<{name}>\\d+)" for name in parts[1::2]]
    return re.compile("".join(a + b for a, b in zip(literal, [*groups, ""], strict=True)))


def _fill(template: str, numbers: Mapping[str, str]) -> str:
    """The template with its numbers; placeholders without one stay."""
    return re.sub(r"\{(\w+)\}", lambda m: numbers.get(m.group(1), m.group(0)), template)
