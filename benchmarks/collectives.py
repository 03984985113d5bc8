"""What share of a step its collectives are: one process and two, one thread each.

    python benchmarks/collectives.py
    python benchmarks/collectives.py --shape tiny --steps 2      # does it run?

Each arrangement runs in fresh processes that meet over gloo, and trains the same model with the
recipe's own functions on as many tokens a process. The wall seconds inside torch.distributed's
collectives are added up on every process; they hold the waiting for the other one, too.

README.md beside this file says how to read what comes out.
"""

import argparse
import statistics
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from measuring import ROOT, circumstances, save

COLLECTIVES = (
    "all_gather_into_tensor", "all_gather_single", "reduce_scatter_single", "reduce_scatter_tensor",
    "all_reduce", "all_to_all_single",
)  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "e32_k4": {"embed_dim": 256, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64,
               "num_experts": 32, "experts_per_token": 4, "expert_hidden_dim": 256},
    "tiny": {"embed_dim": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16,
             "num_experts": 4, "experts_per_token": 2, "expert_hidden_dim": 16},
}  # fmt: skip
VOCAB, WARM_UP = 4096, 2


@dataclass(frozen=True)
class Arrangement:
    """Processes, and the keys of the recipe's configuration."""

    processes: int
    keys: dict[str, Any]


ARRANGEMENTS = {
    "one process": Arrangement(1, {}),
    "two, dp_shard": Arrangement(2, {"dp_shard": 2}),
    "two, ep, all_to_all": Arrangement(2, {"ep": 2}),
    "two, ep, all_gather": Arrangement(2, {"ep": 2, "ep_dispatcher": "all_gather"}),
}


@contextmanager
def timed_collectives() -> Iterator[dict[str, float]]:
    """Wall seconds of this process inside torch.distributed's collectives, by name."""
    seconds: dict[str, float] = {}
    before = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}
    depth = [0]  # one may be made of another

    def timed(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            depth[0] += 1
            start = time.perf_counter()
            try:
                work = before[name](*args, **kwargs)
                if work is not None:
                    work.wait()  # gloo: nothing overlaps with it on a CPU that computes
                return work
            finally:
                depth[0] -= 1
                if depth[0] == 0:
                    spent = time.perf_counter() - start
                    seconds[name] = seconds.get(name, 0.0) + spent

        return call

    for name in before:
        setattr(dist, name, timed(name))
    try:
        yield seconds
    finally:
        for name, function in before.items():
            setattr(dist, name, function)


def measure(rank: int, arrangement: Arrangement, shape: str, options: dict[str, Any]) -> None:
    """One process of an arrangement: its steps, saved under its rank."""
    import moe_full_finetune as recipe
    from omegaconf import OmegaConf

    from moe_builders.data.batch import collate, shift_labels
    from moe_builders.parallel.grad_norm import GradNorm
    from moe_builders.parallel.world import open_world
    from moe_builders.training.config import check_config
    from moe_builders.training.stepping import Stepper

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=options["meeting"], rank=rank, world_size=arrangement.processes
    )
    length, rows = options["length"], options["rows"]
    builder = "moe_builders.families.qwen3_moe.qwen3_moe"
    config = check_config(OmegaConf.create({
        "output_dir": "unused", "dataset": "unused", "optimizer": "unused", "device": "cpu",
        "model": {"_component_": builder, **SHAPES[shape], "vocab_size": VOCAB,
                  "max_seq_len": length},
        "max_seq_len": length, "batch_size": rows, **arrangement.keys,
    }))  # fmt: skip
    keys = {key: value for key, value in arrangement.keys.items() if key != "ep_dispatcher"}
    stream = torch.Generator().manual_seed(rank)
    found = []
    with open_world(device="cpu", **keys) as world:
        model = recipe.build_model(config, world).model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        stepper = Stepper(optimizer, GradNorm())
        for number in range(WARM_UP + options["steps"]):
            tokens = torch.randint(0, VOCAB, (rows, length), generator=stream).tolist()
            batch = collate(
                [{"tokens": t, "labels": shift_labels(t), "lengths": [length]} for t in tokens],
                pad_id=0,
            )
            world.barrier()
            with timed_collectives() as inside:
                start = time.perf_counter()
                recipe.train_step(model, [batch], config, world)
                recipe.update(stepper, None, config)
                whole = time.perf_counter() - start
            if number >= WARM_UP:
                found.append({"seconds": whole, "inside": dict(inside)})
    dist.destroy_process_group()
    torch.save(found, f"{options['folder']}/{rank}.pt")


def run(name: str, shape: str, options: dict[str, Any]) -> dict[str, Any]:
    """Median seconds of a step, and of that inside collectives, over steps and processes."""
    arrangement = ARRANGEMENTS[name]
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/{uuid.uuid4().hex}"
        here = options | {"folder": folder, "meeting": meeting}
        mp.spawn(measure, args=(arrangement, shape, here), nprocs=arrangement.processes)
        steps = [
            step
            for rank in range(arrangement.processes)
            for step in torch.load(Path(folder, f"{rank}.pt"))
        ]
    return summary(steps) | {"processes": arrangement.processes, "keys": arrangement.keys}


def summary(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of steps: seconds, share inside collectives (smallest, median, largest), by name."""
    shares = sorted(sum(s["inside"].values()) / s["seconds"] for s in steps)
    names = sorted({name for step in steps for name in step["inside"]})
    return {
        "seconds": statistics.median(s["seconds"] for s in steps),
        "share": [shares[0], statistics.median(shares), shares[-1]],
        "by_collective": {
            n: statistics.median(s["inside"].get(n, 0.0) / s["seconds"] for s in steps)
            for n in names
        },
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """What is printed, and stands in the README."""
    one = found["one process"]["seconds"]
    lines = [
        "| arrangement | step, of one process's | inside collectives | range |",
        "|---|---|---|---|",
    ]
    for name, values in found.items():
        low, middle, high = (f"{100 * share:.0f} %" for share in values["share"])
        lines.append(f"| {name} | {values['seconds'] / one:.2f} | {middle} | {low} to {high} |")
    return "\n".join(lines)


def main() -> None:
    """Measure every arrangement and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="e32_k4")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results/collectives_cpu.json"
    )
    given = parser.parse_args()
    where = circumstances(torch.device("cpu"), 1)
    options = {"steps": given.steps, "rows": given.rows, "length": given.length}
    found: dict[str, dict[str, Any]] = {}
    for name in ARRANGEMENTS:
        found[name] = run(name, given.shape, options)
        result = {"where": where, "shape": given.shape, **options, "found": found}
        save(result, given.out)
    print(table(found))


if __name__ == "__main__":
    main()
