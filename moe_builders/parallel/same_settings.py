"""Whether all processes were given the same configuration, found out before they share work."""

import platform
from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist

from moe_builders.errors import InputError
from moe_builders.parallel.agree import gather_objects


def check_same_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings that differ from those of process 0; all processes must call.

    Each machine reads a configuration file of its own. Another seed or rate on one of them would
    train on, with nothing to show for it; another number of steps would leave the others waiting.

    Args:
        settings: of this process, sections inside sections.

    Raises:
        InputError: on every process, if the settings of any are others; the first key is named.
    """
    own = dict(_flat(settings))
    first: list[Any] = [own, platform.node()]
    dist.broadcast_object_list(first, src=0)
    theirs, host = first
    keys = [key for key in {**theirs, **own} if theirs.get(key, _NONE) != own.get(key, _NONE)]
    differs = (keys[0], own.get(keys[0], _NONE), platform.node()) if keys else None
    for rank, each in enumerate(gather_objects(differs)):
        if each is not None:
            key, value, where = each
            raise InputError(
                f"{key} is {value} for process {rank} (on {where}), but {theirs.get(key, _NONE)} "
                f"for process 0 (on {host}): give all of them the same configuration"
            )


_NONE = "not there"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and what is written there."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", repr(value)
