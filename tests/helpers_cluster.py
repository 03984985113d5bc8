"""The processes of a job, started as torchrun's agent does it, but for the imports' seconds.

The job's store belongs to whoever starts it, as to the agent: its port is free when it is taken,
and it outlives a process that is killed. Nobody here kills the others when one is gone.
"""

import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import moe_full_finetune as recipe
import pytest
import torch
import torch.distributed as dist
from helpers_train import RaggedDataset

from moe_builders.parallel import world as world_module
from moe_builders.parallel.channel import Channel
from moe_builders.parallel.heartbeat import LostProcess
from moe_builders.parallel.launch import launch
from moe_builders.parallel.world import open_world

FORK = multiprocessing.get_context("forkserver")


class Job:
    """A job's processes and what they say.

    Args:
        size: number of processes.
        function: of this file: what each process calls with args; its result is the exit code.
        folder: for what they say.
        slots: rank of each slot of the machine, in order; None: as they come.
        own_store: the process of rank 0 keeps the store, as without an agent.
    """

    def __init__(self, size, function, *args, folder, slots=None, own_store=False):
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        env = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(self.store.port),
               "TORCHELASTIC_USE_AGENT_STORE": str(not own_store)}  # fmt: skip
        if own_store:
            del self.store  # its port was free a moment ago
        ranks = range(size) if slots is None else slots
        self.logs, self.by_rank = {}, {}
        for slot, rank in enumerate(ranks):
            self.logs[rank] = folder / f"{time.monotonic_ns()}_rank{rank}.log"
            own = env | {"RANK": str(rank), "LOCAL_RANK": str(slot)}
            process = FORK.Process(target=_process, args=(own, self.logs[rank], function, args))
            process.start()
            self.by_rank[rank] = process

    def wait_until_all_are_there(self, seconds=120):
        """Until each has given its first sign of life: before, only an agent ends the others."""
        end = time.monotonic() + seconds
        while sum("alive/" in key for key in self.store.list_keys()) < len(self.by_rank):
            assert time.monotonic() < end, [self.said(rank) for rank in self.by_rank]
            time.sleep(0.02)

    def kill(self, rank, number=signal.SIGKILL):
        os.kill(self.by_rank[rank].pid, number)

    def codes(self, seconds=180):
        """Exit codes by rank; a process that has not ended by then is an error."""
        end = time.monotonic() + seconds
        for process in self.by_rank.values():
            process.join(max(0.0, end - time.monotonic()))
        codes = {rank: process.exitcode for rank, process in sorted(self.by_rank.items())}
        self.end()
        said = "\n".join(self.said(rank) for rank in codes if self.logs[rank].exists())
        assert None not in codes.values(), f"did not end: {codes}\n{said}"
        return list(codes.values())

    def end(self):
        """Kill what is left: a process that hangs would hold up the tests' own end."""
        for process in self.by_rank.values():
            process.kill()
            process.join()

    def said(self, rank):
        return self.logs[rank].read_text()


def _process(env, log, function, args):
    sys.stdout = sys.stderr = Path(log).open("w")  # noqa: SIM115 of this process as a whole
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    os.environ.update(env)
    torch.set_num_threads(1)
    code = globals()[function](*args)
    sys.stdout.flush()
    sys.exit(code)


def train(cfg):
    return launch(recipe.main, lambda: cfg)


@dataclass(frozen=True)
class Fate:
    """What happens to which process in its third step, and where the others notice."""

    rank: int
    how: str


def small_run(fate, timeout_minutes=10.0):
    """Collectives without a model, five steps of them; one process meets its fate."""

    def main(_):
        with open_world(device="cpu", timeout_minutes=timeout_minutes) as world:
            for number in range(1, 6):
                world.doing(f"step {number}")
                if number == 3 and world.rank == fate.rank:
                    meet(fate.how)
                world.sum(torch.ones(3))
                world.gather_objects(number)

    return launch(main, lambda: None)


def timeouts(minutes):
    """Write those of all groups of two copies [s], and of one that a thread has for itself."""
    with open_world(device="cpu", dp_replicate=2, timeout_minutes=minutes) as world:
        groups = [None, *world.mesh.get_all_groups(), Channel(world, own=True).group]
        found = [dist.distributed_c10d._get_default_group() if g is None else g for g in groups]
        cpu = torch.device("cpu")
        print([g._get_backend(cpu).options._timeout.total_seconds() for g in found])
    return 0


def killed_at_a_meeting(rank, where):
    """One process is killed as the others make a group of the store: a mesh's, or a thread's."""

    def main(_):
        own = os.environ["RANK"] == str(rank)
        if own and where == "mesh":
            world_module._meshes = lambda *_: meet("kill")
        with open_world(device="cpu", dp_replicate=2, timeout_minutes=10.0) as world:
            if own:
                meet("kill")
            world.new_gloo_group()

    return launch(main, lambda: None)


def alone_of_two(minutes):
    """Rank 1 does not come."""
    if os.environ["RANK"] == "1":
        return 0
    with pytest.raises(LostProcess) as caught, open_world(device="cpu", timeout_minutes=minutes):
        pass
    print(caught.value)
    return 0


def meet(how):
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "raise":
        raise ZeroDivisionError("by hand")
    else:
        assert how == "nothing"


class Fateful(RaggedDataset):
    """At the n-th row that a process reads something happens to it, once for each line of a file.

    Args:
        plan: file of lines "rank row signal-or-seconds", one a start of the job; the first is
            taken off when it has happened.
    """

    def __init__(self, tokenizer, plan):
        super().__init__(tokenizer)
        self.plan, self.seen = Path(plan), 0

    def __getitem__(self, index):
        self.seen += 1
        lines = self.plan.read_text().splitlines()
        if lines:
            rank, row, number = map(int, lines[0].split())
            if os.environ["RANK"] == str(rank) and self.seen == row:
                self.plan.write_text("\n".join(lines[1:]))
                os.kill(os.getpid(), number)
        return super().__getitem__(index)


class SlowRows(RaggedDataset):
    """One process takes its time for each row."""

    def __init__(self, tokenizer, rank, seconds):
        super().__init__(tokenizer)
        self.seconds = seconds if os.environ.get("RANK") == str(rank) else 0.0

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return super().__getitem__(index)


class SlowUpdate(torch.optim.SGD):
    """One process takes its time for each update."""

    def __init__(self, params, lr, rank, seconds):
        super().__init__(params, lr=lr)
        self.seconds = seconds if os.environ.get("RANK") == str(rank) else 0.0

    def step(self, closure=None):
        time.sleep(self.seconds)
        return super().step(closure)
