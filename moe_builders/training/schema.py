"""Fields of a configuration that carry their own limits, and the check that reads them."""

import difflib
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import field, fields, is_dataclass
from typing import Any

from moe_builders.errors import InputError
from moe_builders.instantiate import did_you_mean

_WORDS = {
    int: "an integer", float: "a number", bool: "true or false", str: "a text", list: "a list",
    type(None): "null",
}  # fmt: skip
# keys of other trainers, and those that stand inside a component here
_PER_TOKEN = "model.experts_per_token (of a base_model, what its config.json says)"
_OF_MODEL = "model.num_experts (of a base_model, what its config.json says)"
_ELSEWHERE = {
    **dict.fromkeys(
        ("top_k", "topk", "moe_top_k", "moe_topk", "moe_router_topk", "num_experts_per_tok",
         "num_experts_per_token", "experts_per_token"), _PER_TOKEN),
    **dict.fromkeys(
        ("num_experts", "moe_num_experts", "num_moe_experts", "num_local_experts",
         "n_routed_experts"), _OF_MODEL),
    **dict.fromkeys(
        ("router_jitter_noise", "jitter_noise", "jitter_eps", "moe_input_jitter_eps"),
        "routing.jitter (input_uniform) and routing.jitter_scale"),
    **dict.fromkeys(
        ("moe_expert_capacity_factor", "expert_capacity_factor", "train_capacity_factor"),
        "routing.capacity_factor"),
    **dict.fromkeys(("moe_token_drop_policy", "moe_token_dropping"), "routing.drop"),
    **dict.fromkeys(
        ("score_function", "score_func", "scoring_func", "moe_router_score_function"),
        "model.score_function, or an argument of router"),
    **dict.fromkeys(
        ("moe_router_load_balancing_type", "router_type", "moe_router_type"),
        "router, a component (moe_builders.routers.…), and router_losses"),
    **dict.fromkeys(("moe_router_enable_expert_bias", "use_routing_bias"), "model.expert_bias"),
    **dict.fromkeys(("load_balance_coeff", "bias_update_speed"), "expert_bias.update_rate"),
    **dict.fromkeys(
        ("z_loss_coef", "z_loss_coeff", "z_loss_weight", "router_z_loss"), "router_losses.z_coef"),
    **dict.fromkeys(
        ("aux_loss_alpha", "router_aux_loss_alpha", "moe_loss_weight"),
        "router_losses.load_balancing_coef"),
    "moe_router_dtype": "an argument of router, gate_precision (routers compute in fp32 anyhow)",
    "moe_pad_expert_input_to_capacity": "routing.pad_to_capacity",
    "output_router_logits": "router_losses, which need no switch",
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
# sections of what concerns experts, and what a key looks like that belongs into one
_MOE_SECTIONS = ("router_losses", "routing", "expert_bias")
_OF_EXPERTS = re.compile(r"moe|rout|expert|aux_|balanc|capacity|jitter|gat(e|ing)\b")


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


def unknown_key(schema: Any, key: str) -> str:
    """The sentence for a key that is not there: what it is called here, a near name, or all names.

    Args:
        schema: dataclass of the whole configuration.
        key: dotted.
    """
    start = f"unknown key {key!r} in the config"
    if key in _ELSEWHERE:
        return f"{start}: here it is {_ELSEWHERE[key]}"
    sections = {f.name: list(f.type.__dataclass_fields__) for f in fields(schema)
                if is_dataclass(f.type)}  # fmt: skip
    section, _, last = key.rpartition(".")
    names = sections.get(section, [])
    near = did_you_mean(last, names)
    if not near:
        paths = {name: f"{s}.{name}" for s, inside in sections.items() for name in inside}
        if not names:  # a key of a section is meant for a section
            paths |= {f.name: f.name for f in fields(schema)}
        found = difflib.get_close_matches(last, paths, n=1)
        near = f" (did you mean {paths[found[0]]!r}?)" if found else ""
    if names:
        return f"{start}{near}; {section} takes {', '.join(names)}"
    if not near and _OF_EXPERTS.search(key):
        known = "; ".join(f"{s}: {', '.join(sections[s])}" for s in _MOE_SECTIONS if s in sections)
        return f"{start}: what concerns experts stands in {known}; or is an argument of model"
    return start + near


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
