"""Fields of a configuration that carry their own limits, and the check that reads them."""

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import field, fields, is_dataclass
from typing import Any

from moe_builders.errors import InputError

_WORDS = {
    int: "an integer", float: "a number", bool: "true or false", str: "a text", list: "a list",
    type(None): "null",
}  # fmt: skip
# keys of other trainers, and those that stand inside a component here
_ELSEWHERE = {
    "betas": "optimizer.betas", "bf16": "compute_dtype", "column": "dataset.column",
    "data_files": "dataset.data_files", "dtype": "param_dtype and compute_dtype",
    "fp16": "compute_dtype", "gradient_checkpointing": "enable_activation_checkpointing",
    "learning_rate": "optimizer.lr", "lr": "optimizer.lr", "max_grad_norm": "clip_grad_norm",
    "model_name_or_path": "base_model", "num_train_epochs": "epochs",
    "num_warmup_steps": "lr_scheduler.num_warmup_steps", "packed": "dataset.packed",
    "per_device_train_batch_size": "batch_size", "resume_from_checkpoint": "resume",
    "save_steps": "checkpoint_every_n_steps", "source": "dataset.source",
    "split": "dataset.split", "streaming": "dataset.streaming",
    "warmup_steps": "lr_scheduler.num_warmup_steps", "weight_decay": "optimizer.weight_decay",
}  # fmt: skip


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


def elsewhere(key: str) -> str:
    """What a key of other trainers, or one of a component's, is called here; "" for others."""
    return f": here it is {_ELSEWHERE[key]}" if key in _ELSEWHERE else ""


def wrong_type(schema: Any, key: str, given: Mapping[Any, Any]) -> str | None:
    """The sentence for a value that its field cannot take; None where the types do not tell.

    Args:
        schema: dataclass of the whole configuration.
        key: dotted.
        given: values as they were given.
    """
    *parents, last = key.split(".")
    node: Any = given
    for parent in parents:
        entry = getattr(schema, "__dataclass_fields__", {}).get(parent)
        schema, node = getattr(entry, "type", None), node.get(parent)
        if not is_dataclass(schema) or not isinstance(node, Mapping):
            return None
    entry = getattr(schema, "__dataclass_fields__", {}).get(last)
    if entry is None or last not in node:
        return None
    value, kinds = node[last], _kinds(entry.type)
    if not all(kind in _WORDS for kind in kinds) or type(value) in kinds:
        return None
    words, default = " or ".join(_WORDS[kind] for kind in kinds), entry.default
    if value is not None:
        return f"{key} is {value!r}, but must be {words}"
    remedy = "" if default in (NO_DEFAULT, "???") else f", or leave it out for {_shown(default)}"
    return f"{key} is null, but must be {words}: write {key}=VALUE{remedy}"


def _kinds(annotation: Any) -> tuple[Any, ...]:
    if isinstance(annotation, types.UnionType):
        return annotation.__args__
    return (typing.get_origin(annotation) or annotation,)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
