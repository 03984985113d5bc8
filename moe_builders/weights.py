"""A checkpoint layout as data: rows that say where each tensor on disk lives in the model.

A family's layout is a tuple of rows. A row names a tensor on disk and a parameter of ours, with
placeholders: ``{l}`` a layer number, ``{e}`` an expert number, ``{gate,up}`` alternatives that
stand one after the other in the parameter. From the rows and a model's shapes comes the plan, a
list of pieces, and from the plan come import, export, the completeness check and the docs' table.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product


@dataclass(frozen=True)
class Rename:
    """One tensor on disk is one parameter of ours, same shape."""

    disk: str
    ours: str


@dataclass(frozen=True)
class Stack:
    """Many tensors on disk are one parameter: expert ``{e}`` is its first dim, alternatives
    ``{a,b}`` follow each other along its second."""

    disk: str
    ours: str


@dataclass(frozen=True)
class PassThrough:
    """Tensors on disk that the model has no place for; an export carries them over unchanged."""

    disk: str


Row = Rename | Stack | PassThrough


@dataclass(frozen=True)
class Piece:
    """One tensor on disk fills one region of one parameter.

    Attributes:
        disk: its name on disk.
        ours: the parameter's name.
        offset: where the region starts, per dim of the parameter.
        size: how far it reaches, per dim.
        shape: of the tensor on disk (the region without its expert dim).
    """

    disk: str
    ours: str
    offset: tuple[int, ...]
    size: tuple[int, ...]
    shape: tuple[int, ...]


def make_plan(rows: Iterable[Row], shapes: Mapping[str, Sequence[int]]) -> list[Piece]:
    """Expand rows against a model's parameters.

    Args:
        rows: the layout; rows that match no parameter (an optional bias) are skipped.
        shapes: global shape of each parameter and persistent buffer.

    Returns:
        Pieces that cover every parameter exactly once.

    Raises:
        ValueError: a parameter that no row or more than one row fills, or a tensor on disk that
            fills two (mistakes in the rows).
    """
    pieces: dict[str, list[Piece]] = {name: [] for name in shapes}
    for row in rows:
        if isinstance(row, PassThrough):
            continue
        pattern = _pattern(row.ours)
        for name, shape in shapes.items():
            match = pattern.fullmatch(name)
            if match is None:
                continue
            if pieces[name]:
                raise ValueError(f"{name} is filled by more than one row, the last one {row}")
            expand = _stack_pieces if isinstance(row, Stack) else _rename_piece
            pieces[name] = expand(row.disk, match.groupdict(), name, tuple(shape))
    unfilled = [name for name, found in pieces.items() if not found]
    if unfilled:
        raise ValueError(f"no row fills {', '.join(unfilled)}")
    plan = [piece for found in pieces.values() for piece in found]
    uses = Counter(piece.disk for piece in plan)
    shared = [name for name, count in uses.items() if count > 1]
    if shared:
        raise ValueError(f"more than one region is filled from {', '.join(shared)}")
    return plan


def passes_through(rows: Iterable[Row], disk_name: str) -> bool:
    """Whether a tensor on disk is one that an export carries over unchanged."""
    return any(
        isinstance(row, PassThrough) and _pattern(row.disk).fullmatch(disk_name) for row in rows
    )


def own_rows(names: Iterable[str]) -> tuple[Row, ...]:
    """The layout of a model that has none: every tensor under our own name."""
    return tuple(Rename(name, name) for name in names)


def _rename_piece(
    disk: str, numbers: dict[str, str], name: str, shape: tuple[int, ...]
) -> list[Piece]:
    return [Piece(_fill(disk, numbers), name, (0,) * len(shape), shape, shape)]


def _stack_pieces(
    disk: str, numbers: dict[str, str], name: str, shape: tuple[int, ...]
) -> list[Piece]:
    alternatives = re.search(r"\{(\w+(?:,\w+)+)\}", disk)
    words = alternatives.group(1).split(",") if alternatives else [""]
    if len(shape) < 2 or shape[1] % len(words):
        raise ValueError(f"{name} of shape {shape} cannot be cut into {len(words)} parts")
    part = (shape[1] // len(words), *shape[2:])
    pieces = []
    for expert, (number, word) in product(range(shape[0]), enumerate(words)):
        source = disk.replace(alternatives.group(0), word) if alternatives else disk
        source = _fill(source, numbers | {"e": str(expert)})
        offset = (expert, number * part[0], *(0 for _ in shape[2:]))
        pieces.append(Piece(source, name, offset, (1, *part), part))
    return pieces


def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    literal = (re.escape(part) for part in parts[::2])
    groups = [f"(?P<{name}>\\d+)" for name in parts[1::2]]
    return re.compile("".join(a + b for a, b in zip(literal, [*groups, ""], strict=True)))


def _fill(template: str, numbers: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: numbers[match.group(1)], template)
