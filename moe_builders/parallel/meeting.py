"""Where the processes of a launch meet, also when torchrun has started them again."""

import os
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from moe_builders.errors import InputError


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
        InputError: several torchruns may start again, and would meet in the old store.
    """
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
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, size, is_master=False, timeout=timeout)
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {"store": dist.PrefixStore(f"start_{start}", store), "rank": rank, "world_size": size}
