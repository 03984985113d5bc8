"""What a place in the data depends on, kept with it, and what it means if that has changed."""

from collections.abc import Mapping
from typing import Any

from moe_builders.errors import InputError

# key -> what it is called; the place is meaningless where one of these is another
_FIXED = {
    "kind": "the kind of data (sized or stream)", "packed": "packed",
    "rows": "the numbers of rows of the data sets", "shuffle_window": "shuffle_window",
    "sets": "the kinds of the data sets in the list",
}  # fmt: skip
_ORDER = {
    "seed": "seed", "shuffle": "shuffle", "max_seq_len": "max_seq_len",
    "long_samples": "long_samples", "weights": "the weights of the data sets",
}  # fmt: skip


def stamp(**values: Any) -> dict[str, Any]:
    """What a place depends on: numbers, words and lists of them."""
    assert set(values) <= set(_FIXED) | set(_ORDER)
    return values


def compare(state: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Sentences on what differs between a saved place's stamp and the data at hand.

    Raises:
        InputError: it is no such place, or it means nothing here.
    """
    saved = state.get("of")
    if not isinstance(saved, Mapping):
        raise InputError(f"this is no place in the data that was saved: {sorted(state)}")
    fixed = dict(_FIXED)
    if own.get("kind") == "stream":  # a row begun before would not fit the rows of now
        fixed["max_seq_len"] = _ORDER["max_seq_len"]
    for key, name in fixed.items():
        if saved.get(key) != own.get(key):
            raise InputError(
                f"the place in the data cannot be found again: {name} was {_word(saved.get(key))} "
                f"when it was saved and is now {_word(own.get(key))}; use the data and keys of "
                "then, or start anew"
            )
    return [
        f"{name} was {_word(saved.get(key))} and is now {_word(own.get(key))}: the samples come in "
        "another order than before, so some come twice in this epoch and others not at all"
        for key, name in _ORDER.items()
        if saved.get(key) != own.get(key)
    ]


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(str(v) for v in value)
    return "none" if value is None else str(value)
