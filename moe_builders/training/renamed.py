"""Other trainers' and earlier names of keys, moved with a warning; what has no place, refused."""

import warnings
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from moe_builders.errors import InputError

_BALANCING = "router_losses.load_balancing_coef"
_RENAMED = {
    **dict.fromkeys(
        ("router_aux_loss_coeff", "router_aux_loss_coef", "aux_loss_coeff", "aux_loss_coef",
         "moe_aux_loss_coeff", "load_balancing_loss_coef"), _BALANCING),
    **dict.fromkeys(
        ("router_z_loss_coef", "router_z_loss_coeff", "moe_z_loss_coeff"), "router_losses.z_coef"),
    **dict.fromkeys(
        ("moe_router_bias_update_rate", "gate_bias_update_factor"), "expert_bias.update_rate"),
    "router_loss_mask": "router_losses.mask",
    **dict.fromkeys(("expert_parallel_dim", "expert_parallel_degree", "ep_size"), "ep"),
    "data_parallel_replicate_dim": "dp_replicate",
    "data_parallel_shard_dim": "dp_shard",
}  # fmt: skip
_NO_TP = (
    "there is no tensor parallelism: experts are small matrices, which ep deals out whole and "
    "dp_shard stores in parts, with less on the wire; leave {key} out and set ep or dp_shard"
)
_NO_CP = (
    "there is no context parallelism: torch's own takes no masks of documents and padding; leave "
    "{key} out, and for longer sequences set enable_activation_checkpointing and batch_size=1"
)
_NO_SUCH_AXIS = {
    **dict.fromkeys(("tp", "tp_size", "tensor_parallel_dim", "tensor_parallel_degree"), _NO_TP),
    **dict.fromkeys(("cp", "cp_size", "context_parallel_dim", "context_parallel_degree"), _NO_CP),
}  # fmt: skip
_SECTIONS = ("", "router_losses", "expert_bias")  # where an old name may stand
_COEFFICIENTS = {
    **_RENAMED, "load_balancing_coef": _BALANCING, "z_coef": "router_losses.z_coef",
    "own_coef": "router_losses.own_coef",
}  # fmt: skip


def rename_old_keys(values: DictConfig, known: Mapping[str, Any]) -> DictConfig:
    """The same configuration with today's names; each old one is told of in a FutureWarning.

    Args:
        values: as given; sections are mappings where they are there.
        known: top-level keys of today, which are nobody's old name.

    Raises:
        InputError: a key is given under both names, or is an axis that the mesh does not have.
    """
    given = OmegaConf.to_container(values)
    assert isinstance(given, dict)
    for key in given:
        if key in _NO_SUCH_AXIS and given[key] not in (1, None):
            raise InputError(f"{key} is {given[key]}, but {_NO_SUCH_AXIS[key].format(key=key)}")
    found = [
        (section, old)
        for section in _SECTIONS
        for old in (given.get(section, {}) if section else given)
        if old in _RENAMED and (section or old not in known)
    ]
    for section, old in found:
        new = _RENAMED[old]
        old_path = f"{section}.{old}" if section else old
        parent, _, name = new.partition(".")
        target = given.setdefault(parent, {})
        if name in target:
            raise InputError(
                f"{old_path} is an old name of {new}, but that is given too: leave {old_path} out"
            )
        target[name] = (given[section] if section else given).pop(old)
        balanced = " (whose loss is 1 where experts are used alike)" if new == _BALANCING else ""
        warnings.warn(
            f"{old_path} is an old name of {new}{balanced}: use that one",
            FutureWarning,
            stacklevel=2,
        )
    return OmegaConf.create(given) if found else values


def refuse_coefficients(node: Any, path: str, component: str = "") -> None:
    """Refuse a loss's coefficient among the arguments of one of this package's components.

    Args:
        node: any part of a configuration.
        path: where it stands.
        component: the component that it is an argument of.

    Raises:
        InputError: the key and where it belongs.
    """
    if isinstance(node, list):
        for number, entry in enumerate(node):
            refuse_coefficients(entry, f"{path}[{number}]", component)
    if not isinstance(node, Mapping):
        return
    component = str(node.get("_component_", component))
    for key, value in node.items():
        if key in _COEFFICIENTS and component.startswith("moe_builders."):
            raise InputError(
                f"{path}.{key} is given, but modules take no coefficients: these live in "
                f"router_losses and expert_bias, so set {_COEFFICIENTS[key]}={value} instead"
            )
        refuse_coefficients(value, f"{path}.{key}", component)
