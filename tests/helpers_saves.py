"""What processes do with checkpoints in the tests of several processes."""

import dataclasses
import json
import os
import resource
import signal
import time
from pathlib import Path

import moe_full_finetune as recipe
import torch
from helpers_resume import TIMES
from helpers_train import RaggedDataset
from torch.distributed.tensor import Shard, distribute_tensor

from moe_builders.checkpoint import saving
from moe_builders.checkpoint.run_checkpoints import RunCheckpoints, read_checkpoint
from moe_builders.checkpoint.state_parts import Entry, StoredParts
from moe_builders.errors import InputError
from moe_builders.parallel.dcp import stored_tensors
from moe_builders.parallel.world import open_world
from moe_builders.training.reporting import Reporter


def tensors_of(world, value, rows=5):
    """A sharded tensor, uneven over two, and one that all have; not small, so that writes fail."""
    sharded = torch.arange(rows * 10_000.0).view(rows, -1) + value
    return {"sharded": distribute_tensor(sharded, world.mesh, [Shard(0)]),
            "whole": torch.full((3,), float(value))}  # fmt: skip


def sentence_of(act):
    """What an act raises as an InputError, or None."""
    try:
        act()
    except InputError as error:
        return str(error)
    return None


def full_disk_on_one(folder):
    """The second of two processes cannot write while a save is in flight.

    Returns:
        (sentence of the foreground's save, of the background's next save, of its end, what is
        there afterwards), by process.
    """
    with open_world(device="cpu") as world:
        told = []
        for case in ("foreground", "save", "wait"):
            checkpoints = RunCheckpoints(
                Path(folder) / case / "checkpoints", world=world, keep_last=None,
                background=case != "foreground",
            )  # fmt: skip
            checkpoints.save(1, tensors_of(world, 1), {}, {})
            checkpoints.wait()
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            if world.rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
            first = sentence_of(lambda: checkpoints.save(2, tensors_of(world, 2), {}, {}))  # noqa: B023
            if case == "save":
                assert first is None
                first = sentence_of(lambda: checkpoints.save(3, tensors_of(world, 3), {}, {}))  # noqa: B023
            if case == "wait":
                assert first is None
                first = sentence_of(checkpoints.wait)
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            world.barrier()
            told.append(first.replace(f"{folder}/{case}", ""))
            told.append(sorted(path.name for path in checkpoints.folder.iterdir()))
            world.barrier()
            checkpoints.save(2, tensors_of(world, 2), {}, {})
            checkpoints.__exit__(None, None, None)
            assert checkpoints.newest().step == 2
        return world.gather_objects(told)


def bytes_both_ways(folder):
    """{file: bytes} of a checkpoint that was saved in the foreground, and in the background."""
    with open_world(device="cpu") as world:
        found = []
        for background in (False, True):
            with RunCheckpoints(Path(folder) / str(background), world=world, keep_last=None,
                                background=background) as checkpoints:  # fmt: skip
                tensors = tensors_of(world, 4)
                saved = checkpoints.save(4, tensors, {"a": 1}, {"rank": world.rank}, {"b": [2]})
                if background:  # training goes on, also with collectives
                    for tensor in tensors.values():
                        tensor.zero_()
                    for _ in range(50):
                        world.sum(torch.ones(10))
            world.barrier()
            found.append({path.name: path.read_bytes() for path in saved.iterdir()})
        return found


def damage_on_each(folder):
    """What two processes say of a checkpoint, one of whose files has a flipped byte."""
    with open_world(device="cpu") as world:
        checkpoints = RunCheckpoints(Path(folder), world=world, keep_last=None)
        told = []
        for step, rank in ((1, None), (2, 0), (3, 1)):
            saved = checkpoints.save(step, tensors_of(world, step), {}, {"rank": world.rank})
            if world.is_first and rank is not None:
                path = saved / f"__{rank}_0.distcp"
                data = bytearray(path.read_bytes())
                data[len(data) // 2] ^= 1
                path.write_bytes(data)
            world.barrier()
        found, passed = checkpoints.newest_unharmed()
        told = found.step, [(path.name, problem) for path, problem in passed]
        return world.gather_objects(told)


def die_while_writing(rank, meeting, folder, answer):
    """Two processes; the second is killed inside its second save."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    with open_world(device="cpu") as world:
        checkpoints = RunCheckpoints(Path(folder), world=world, keep_last=None, background=True)
        checkpoints.save(1, tensors_of(world, 1), {}, {})
        checkpoints.wait()
        if rank == 1:
            _die_in_create(checkpoints)
        checkpoints.save(2, tensors_of(world, 2), {}, {})
        started = time.monotonic()
        try:
            checkpoints.wait()
        except Exception as error:
            seconds = time.monotonic() - started
            Path(answer).write_text(json.dumps([type(error).__name__, seconds]))
    os._exit(0)  # the group has lost a member: no farewell


def _die_in_create(checkpoints):
    from moe_builders.checkpoint.manifest import FileSums

    real = FileSums.create

    def create(self, path):
        if path.suffix == ".distcp":
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, path)

    FileSums.create = create


def differences_of_background(cfg):
    """What differs between a run's checkpoints and those of the same run in the background."""
    found, folders = [], {}
    for background in (False, True):
        again = dataclasses.replace(
            cfg, output_dir=f"{cfg.output_dir}_{background}", enable_async_checkpointing=background,
            checkpoint_every_n_steps=1, keep_last=None,
        )  # fmt: skip
        trained = recipe.main(again)
        timeless = [{k: v for k, v in each.items() if k not in TIMES} for each in trained.history]
        folder = Path(again.output_dir)
        checkpoints = sorted(folder.glob("checkpoints/*/*"))
        same = [path for path in checkpoints if path.name not in ("run.json", "record.json")]
        folders[background] = {path.relative_to(folder): path.read_bytes() for path in same}
        folders[background] |= {"history": timeless, "steps": len(trained.history)}
        folders[background]["model"] = (folder / "model/model.safetensors").read_bytes()
    foreground, background = folders.values()
    assert len(foreground) > 3 * foreground["steps"]
    found = [name for name in foreground | background
             if foreground.get(name) != background.get(name)]  # fmt: skip
    return [str(name) for name in found]


class SlowSaves(RaggedDataset):
    """The last process takes half a minute for each checkpoint after the first."""

    def __init__(self, tokenizer, folder):
        super().__init__(tokenizer)
        real = saving.write_tensors_together

        def slow(tensors, partial, **keys):
            last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
            if last and any(Path(folder).glob("step_*")):
                time.sleep(30)
            real(tensors, partial, **keys)

        saving.write_tensors_together = slow


def losses_and_notes(cfg):
    """Loss of every step, and what a run says at its start."""
    said, real = [], Reporter.say

    def say(self, *lines):
        said.extend(lines)
        real(self, *lines)

    Reporter.say = say
    try:
        with torch.compiler.set_stance("force_eager"):  # torchao compiles each shape: seconds
            trained = recipe.main(cfg)
    finally:
        Reporter.say = real
    said = [line for line in said if "saved" not in line]
    return {"losses": [v["loss"] for v in trained.history], "said": said}


def values_in(folder, shapes):
    """An optimizer's states in a checkpoint as whole fp32 tensors, by name.

    Args:
        folder: of the checkpoint.
        shapes: of the parameters by name.
    """
    checkpoint, found = read_checkpoint(folder), {}
    stored = stored_tensors(checkpoint.folder)
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in stored.items()}
    with open_world(device="cpu"):
        checkpoint.read(tensors)

    def read(wanted):
        for name, tensor in wanted.items():
            tensor.copy_(tensors[name])

    for name, shape in shapes.items():
        for key in ("exp_avg", "exp_avg_sq"):
            whole = torch.zeros(shape)
            entry = Entry(f"optimizer.{name}.{key}", whole, whole)
            assert not StoredParts(stored).refill(entry, read)
            found[entry.name] = whole
    return found
