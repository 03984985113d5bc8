"""What an optimizer keeps beside each parameter, known from its name: arithmetic."""

from collections.abc import Mapping
from typing import Any

from moe_builders.errors import InputError

_SMALLEST = 4096  # numbers of a shard; below that ``low_bit`` does not quantise


def state_bytes(
    component: Mapping[str, Any] | None, numels: set[int], *, small: bool, item: int
) -> float:
    """Bytes per number that an optimizer keeps beside a parameter.

    Args:
        component: the optimizer of a configuration; None: AdamW.
        numels: sizes of the parameter's shards.
        small: it is a norm, a bias or a router, which are never quantised.
        item: bytes of a stored number.

    Raises:
        InputError: an optimizer that is not known.
    """
    component = component or {"_component_": "torch.optim.AdamW"}
    name = str(component["_component_"])
    if name in ("torch.optim.AdamW", "torch.optim.Adam"):
        return (2 + bool(component.get("amsgrad"))) * item
    kind = name.removeprefix("moe_builders.training.low_bit.")
    low_bit = {"AdamW8bit": (256, 1.0), "AdamW4bit": (128, 0.5)}
    if kind == "AdamW":
        return 2 * max(item, 4)
    if kind not in low_bit:
        raise InputError(
            f"what {name} keeps is not known: set state_bytes, its bytes per parameter (the plan "
            "knows torch.optim's Adam and AdamW, and those of moe_builders.training.low_bit)"
        )
    block, each = low_bit[kind]
    block = component.get("block_size") or block
    whole = all(n >= _SMALLEST and n % block == 0 for n in numels)
    return 2 * (each + 4 / block) if whole and not small else 2 * max(item, 4)
