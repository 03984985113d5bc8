"""Where the processes of a launch meet, also when torchrun has started them again."""

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from moe_builders.errors import InputError

_LAST_PORT = 65535


def launched_as() -> tuple[int, int] | None:
    """Rank and number of processes, as the launcher's variables say; None without a launcher.

    Raises:
        InputError: RANK is there, but what the variables say is no rank of a launch.
    """
    if "RANK" not in os.environ:  # WORLD_SIZE alone may be left over from something else
        return None
    texts = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    rank, size = (int(text) if text.isdecimal() else -1 for text in texts)
    if not 0 <= rank < size:
        raise InputError(
            f"the environment says RANK={texts[0]!r} and WORLD_SIZE={texts[1]!r}, but a rank must "
            "be one of 0 … WORLD_SIZE-1: launch with torchrun or tune run, which set both, or "
            "unset RANK for one process"
        )
    return rank, size


def meeting_place(rank: int, size: int, timeout: timedelta) -> dict[str, Any]:
    """Arguments of ``init_process_group`` for a process that torchrun has launched.

    torchrun (2.13) keeps one store for all its starts, and nothing in it tells one start from the
    next: processes that are started again may read addresses of those before, and wait for them. A
    single torchrun counts its starts, which makes a prefix. Several count each for itself; there
    it is torchrun that has to make a new store each time, which a variable of its own asks for.

    Args:
        rank: of this process.
        size: number of processes.
        timeout: for the store to answer.

    Raises:
        InputError: several torchruns may start again, and would meet in the old store; or no
            launcher said where to meet.
    """
    host, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    if not host or not port.isdecimal() or int(port) > _LAST_PORT:
        raise InputError(
            f"the environment says RANK={rank}, MASTER_ADDR={host!r} and MASTER_PORT={port!r}, "
            f"but must name a host and a port of at most {_LAST_PORT}: launch with torchrun or "
            "tune run, which set them, or unset RANK for one process"
        )
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
        if restarts > 0:
            raise InputError(
                f"torchrun may start the processes again on several machines (max_restarts is "
                f"{restarts}), where these would wait for the ones before: set "
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on each machine, or "
                "--max_restarts 0"
            )
        return {}
    store = dist.TCPStore(host, int(port), size, is_master=False, timeout=timeout)
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {"store": dist.PrefixStore(f"start_{start}", store), "rank": rank, "world_size": size}
