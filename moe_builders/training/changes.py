"""What differs between the configuration of a checkpoint and that of the run that goes on."""

from collections.abc import Mapping
from typing import Any

_ABSENT = object()


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists -> {dotted key: plain value}; empty ones stay."""
    if isinstance(values, Mapping) and values:
        items = [
            (f"{prefix}.{key}" if prefix else str(key), value) for key, value in values.items()
        ]
    elif isinstance(values, list) and values:
        items = [(f"{prefix}[{i}]", value) for i, value in enumerate(values)]
    else:
        return {prefix: values}
    return {key: value for p, v in items for key, value in flatten(v, p).items()}


def config_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One "key: old -> new" a difference, in the new configuration's order."""
    before, after = flatten(old), flatten(new)
    keys = [*after, *(key for key in before if key not in after)]
    return [
        f"{key}: {_shown(before.get(key, _ABSENT))} -> {_shown(after.get(key, _ABSENT))}"
        for key in keys
        if before.get(key, _ABSENT) != after.get(key, _ABSENT)
    ]


def _shown(value: Any) -> str:
    return "not set" if value is _ABSENT else "null" if value is None else str(value)
