"""Memory that loading (and saving) a folder of several files takes, above what must be there.

    python benchmarks/import_cost.py
    python benchmarks/import_cost.py --gib 0.02 --vocab-size 512 --processes 1     # does it run?

A checkpoint with random bf16 weights is written, loaded as the recipe loads it in fresh processes,
sharded if there are several, and exported again; the export must hold the same bytes. Peaks are the
kernel's own (VmHWM), from when everything is imported and the processes know each other.

README.md beside this file says how to read what comes out.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measuring import ROOT, circumstances, save
from safetensors import safe_open
from safetensors.torch import save_file

COMMON = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "dtype": "bfloat16",
    "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4,
    "head_dim": 64, "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 768,
    "intermediate_size": 768, "norm_topk_prob": True, "max_position_embeddings": 2048,
    "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
LAYER_BYTES = 2 * 32 * 3 * 1024 * 768  # of the experts, which are nearly all of it
MIB = 2**20


def write_checkpoint(
    folder: Path, *, num_layers: int, vocab_size: int, shard_bytes: int
) -> dict[str, int]:
    """A folder as the hub has them, a shard in memory at a time; what is in it, in bytes."""
    from moe_builders.checkpoint.stream import model_shapes
    from moe_builders.hf_source import find_family
    from moe_builders.weights import make_plan

    config = COMMON | {"num_hidden_layers": num_layers, "vocab_size": vocab_size}
    family = find_family(config, "the config")
    with torch.device("meta"):
        model = family.build(config)
    sizes = {p.disk: torch.Size(p.shape) for p in make_plan(family.weight_map, model_shapes(model))}
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, shape in sizes.items():
        if room <= 0:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= 2 * shape.numel()
    stream, weight_map = torch.Generator().manual_seed(0), {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            name: torch.empty(sizes[name], dtype=torch.bfloat16).normal_(generator=stream)
            for name in names
        }
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    counts = [2 * shape.numel() for shape in sizes.values()]
    return {"files": len(shards), "tensors": len(counts), "largest_tensor": max(counts),
            "total": sum(counts)}  # fmt: skip


def resident(kind: str) -> int:
    """Bytes in memory, pages of mapped files included: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def peak_above(before: int, act: Any) -> tuple[Any, dict[str, float]]:
    """What ``act`` gives, and its seconds and the bytes it had above ``before`` at most."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    start = time.perf_counter()
    answer = act()
    seconds = time.perf_counter() - start
    return answer, {"peak_above": resident("VmHWM") - before, "seconds": seconds}


def work(folder: Path, out: Path) -> None:
    """One process of a launch: load, save, and write down what it took."""
    import moe_full_finetune as recipe
    from omegaconf import OmegaConf

    from moe_builders.parallel.sharding import local_shard
    from moe_builders.parallel.world import open_world
    from moe_builders.training.config import check_config

    config = check_config(OmegaConf.create({
        "output_dir": "unused", "dataset": "unused", "optimizer": "unused", "device": "cpu",
        "base_model": str(folder), "param_dtype": "bf16", "compute_dtype": "bf16",
    }))  # fmt: skip
    with open_world(device="cpu") as world:
        world.barrier()
        before = resident("VmRSS")
        base, load = peak_above(before, lambda: recipe.build_model(config, world))
        shards = [local_shard(tensor).tensor for tensor in base.model.state_dict().values()]
        held = sum(shard.nbytes for shard in shards)
        world.barrier()
        then = resident("VmRSS")
        _, saving = peak_above(
            then, lambda: base.save(out / "model", rank=world.rank, size=world.size)
        )
        world.barrier()
        found = {"rank": world.rank, "before": before, "after": then - before, "model": held,
                 "load": load, "save": saving}  # fmt: skip
        (out / f"rank_{world.rank}.json").write_text(json.dumps(found))


def launch(size: int, folder: Path, out: Path, threads: int) -> list[dict[str, Any]]:
    """Fresh processes that know each other, as torchrun starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": f"{ROOT}:{ROOT / 'recipes'}:{os.environ.get('PYTHONPATH', '')}",
    }  # fmt: skip
    if size == 1:  # without a launcher
        del shared["WORLD_SIZE"]
    command = [sys.executable, __file__, "--work", str(folder), str(out)]
    started = []
    for rank in range(size):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {}
        started.append(subprocess.Popen(command, env=os.environ | shared | own))
    codes = [process.wait() for process in started]
    if any(codes):
        raise SystemExit(f"a process ended with {codes}; its own message stands above")
    return [json.loads((out / f"rank_{rank}.json").read_text()) for rank in range(size)]


def same_bytes(first: Path, second: Path) -> bool:
    """Whether two folders hold the same tensors in the same files, bit for bit."""
    files = sorted(path.name for path in first.glob("*.safetensors"))
    if files != sorted(path.name for path in second.glob("*.safetensors")):
        return False
    for file in files:
        with safe_open(first / file, "pt") as one, safe_open(second / file, "pt") as other:
            if set(one.keys()) != set(other.keys()):
                return False
            for name in one.keys():  # noqa: SIM118 - not a mapping
                pair = [side.get_tensor(name).view(torch.uint8) for side in (one, other)]
                if not torch.equal(*pair):
                    return False
    return True


def measure(
    folder: Path, checkpoint: dict[str, int], size: int, threads: int, parent: Path
) -> dict[str, Any]:
    """Load and save over ``size`` processes; all numbers of the one that took most."""
    with tempfile.TemporaryDirectory(dir=parent) as name:
        out = Path(name)
        ranks = launch(size, folder, out, threads)
        if not same_bytes(folder, out / "model"):
            raise SystemExit("what was loaded and exported is not what the files held")
    worst = max(ranks, key=lambda found: found["load"]["peak_above"] - found["model"])
    above = worst["load"]["peak_above"] - worst["model"]
    return {
        "processes": size, "ranks": ranks, "model": worst["model"], "above_model": above,
        "allowed_above_model": checkpoint["largest_tensor"],
        "within": above <= checkpoint["largest_tensor"],
        "load_seconds": max(found["load"]["seconds"] for found in ranks),
        "save_above": max(found["save"]["peak_above"] for found in ranks),
        "save_seconds": max(found["save"]["seconds"] for found in ranks),
    }  # fmt: skip


def print_table(checkpoint: dict[str, int], results: list[dict[str, Any]]) -> None:
    """One line a number of processes."""
    print(f"\n{checkpoint['total'] / MIB:.0f} MiB in {checkpoint['files']} files, "
          f"{checkpoint['tensors']} tensors, the largest {checkpoint['largest_tensor'] / MIB:.0f} "
          "MiB; in MiB, of the process that took most:")  # fmt: skip
    print(f"{'processes':>10}{'its model':>11}{'above model':>13}{'allowed':>9}{'seconds':>9}"
          f"{'save: above':>13}{'seconds':>9}")  # fmt: skip
    for row in results:
        print(f"{row['processes']:10}{row['model'] / MIB:11.0f}{row['above_model'] / MIB:13.1f}"
              f"{row['allowed_above_model'] / MIB:9.0f}{row['load_seconds']:9.1f}"
              f"{row['save_above'] / MIB:13.0f}{row['save_seconds']:9.1f}"
              + "  <- too much" * (not row["within"]))  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gib", type=float, default=2.0, help="size of the checkpoint, about")
    parser.add_argument("--vocab-size", type=int, default=65536)
    parser.add_argument("--shard-mib", type=int, default=500, help="size of its files, about")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each process")
    parser.add_argument("--folder", help="where the files go for as long; a temporary one")
    parser.add_argument("--out", default=str(ROOT / "benchmarks/results/import_cost_cpu.json"))
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)  # a process of a launch
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Write the checkpoint, load it over each number of processes, write down what it took."""
    args = parse(argv)
    if args.work:
        return work(*map(Path, args.work))
    sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]
    report = circumstances(torch.device("cpu"), args.threads)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name) / "source"
        folder.mkdir()
        layers = max(1, round(args.gib * 2**30 / LAYER_BYTES))
        checkpoint = write_checkpoint(
            folder, num_layers=layers, vocab_size=args.vocab_size, shard_bytes=args.shard_mib * MIB
        )
        results = []
        for size in args.processes:
            results.append(measure(folder, checkpoint, size, args.threads, Path(name)))
            save(report | {"checkpoint": checkpoint, "results": results}, Path(args.out))
    print_table(checkpoint, results)
    return None


if __name__ == "__main__":
    main()
