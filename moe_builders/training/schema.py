"""Fields of a configuration that carry their own limits, and the check that reads them."""

from dataclasses import field, fields, is_dataclass
from typing import Any

from moe_builders.errors import InputError


def at_least(limit: float, *, default: Any) -> Any:
    """A dataclass field whose value must be >= limit (or null, where its type allows that)."""
    return field(default=default, metadata={"at_least": limit})


def above(limit: float, *, default: Any) -> Any:
    """A dataclass field whose value must be > limit (or null)."""
    return field(default=default, metadata={"above": limit})


def one_of(*words: str) -> Any:
    """A dataclass field that takes one of these words; the first is the default."""
    return field(default=words[0], metadata={"one_of": words})


def check_ranges(config: Any, prefix: str = "") -> None:
    """Hold every value of a (nested) dataclass against its field's limit.

    Raises:
        InputError: the first value outside; key, value and limit are named.
    """
    for entry in fields(config):
        key, value, rules = prefix + entry.name, getattr(config, entry.name), entry.metadata
        if is_dataclass(value):
            check_ranges(value, f"{key}.")
        elif value is None:
            continue
        elif "one_of" in rules and value not in rules["one_of"]:
            raise InputError(f"{key} is {value!r}, but must be one of {', '.join(rules['one_of'])}")
        elif "at_least" in rules and not value >= rules["at_least"]:  # NaN is not
            raise InputError(f"{key} is {value}, but must be at least {rules['at_least']}")
        elif "above" in rules and not value > rules["above"]:
            also = " (or null)" if type(None) in getattr(entry.type, "__args__", ()) else ""
            raise InputError(f"{key} is {value}, but must be above {rules['above']}{also}")
