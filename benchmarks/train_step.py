"""Whole optimizer steps, ours beside transformers': tokens/s, and memory above what must be there.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --shapes e64_k8 --dtypes bf16 --repeats 20 --device cuda

Each way of training lives in a process of its own, loads the same folder, and waits to be asked
for one step; they are asked in turn, so that whatever else the machine does hits all alike. A step
is forward, mean cross-entropy, backward, clipping to a norm of 1, fused AdamW; on the same random
tokens. That the work is equal is checked: first loss and first gradient norm must agree.

README.md beside this file says how to read what comes out.
"""

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from measuring import circumstances, peak_bytes, resident_bytes, save, seconds_of
from torch import Tensor, nn

Step = Callable[[Tensor], tuple[Tensor, Tensor]]  # tokens [b, s] -> loss, gradient norm

COMMON = {
    "vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 2048,
    "norm_topk_prob": True, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
# All are qwen3_moe (softmax router): the sizes of other families, not their routers.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "e8_k2": (
        "qwen3_moe with 8 experts of 1024, k=2 (Mixtral's proportions)",
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 1024},
    ),
    "e64_k8": (
        "qwen3_moe with 64 experts of 256, k=8",
        {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 256},
    ),
    "e64_k6_dense1": (
        "qwen3_moe with 64 experts of 256, k=6, first layer dense of 1536",
        {"num_experts": 64, "num_experts_per_tok": 6, "moe_intermediate_size": 256,
         "mlp_only_layers": [0], "intermediate_size": 1536},
    ),
    "tiny": (
        "qwen3_moe with 8 experts of 32, k=2, d=64: a trial of this script, not a measurement",
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
         "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 256},
    ),
}  # fmt: skip
# (weights are stored in, computed in)
DTYPES = {"fp32": ("fp32", "fp32"), "bf16": ("bf16", "bf16"), "mixed": ("fp32", "bf16")}
TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16}
# loss and gradient norm of the first step may differ by this share of their size; bf16 rounds
# routing scores, so that a few tokens go to other experts
TOLERANCE = {"fp32": (1e-4, 1e-3), "bf16": (1e-3, 2e-2), "mixed": (1e-3, 2e-2)}
OURS = ("recipe", "fsdp2", "bare")
THEIRS = ("grouped_mm", "batched_mm", "eager")
RATE, CLIP = 1e-5, 1.0


@dataclass(frozen=True)
class Case:
    """One way of training one shape; plain values, so that it can be sent to a process."""

    shape: str
    dtype: str
    way: str
    folder: str
    device: str
    threads: int
    rows: int
    length: int


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The one optimizer all ways use; torch's default groups."""
    return torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, fused=True)


def plain_step(model: nn.Module, loss_of: Callable[[Tensor], Tensor]) -> tuple[Step, Any]:
    """Loss, backward, clip, update: the loop that transformers' users write."""
    optimizer = adamw(model)

    def step(tokens: Tensor) -> tuple[Tensor, Tensor]:
        loss = loss_of(tokens)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm

    return step, (model, optimizer)


@contextmanager
def theirs(case: Case, device: torch.device) -> Iterator[tuple[Step, Any]]:
    """transformers' model with sdpa attention and one of its ways to compute experts."""
    import transformers
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from moe_builders.parallel.world import open_world

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    stored, computed = (TORCH[name] for name in DTYPES[case.dtype])
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        case.folder, dtype=stored, attn_implementation="sdpa", experts_implementation=case.way
    )
    model.to(device).train()

    def loss_of(tokens: Tensor) -> Tensor:
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    if stored == computed:
        yield plain_step(model, loss_of)
        return
    # torch.autocast would leave its experts in the weights' fp32: FSDP2 is how it computes in bf16
    with open_world(device=case.device) as world:
        policy = MixedPrecisionPolicy(param_dtype=computed, reduce_dtype=stored)
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=world.mesh, mp_policy=policy)
        step, alive = plain_step(model, loss_of)
        yield step, alive


@contextmanager
def ours_bare(case: Case, device: torch.device) -> Iterator[tuple[Step, Any]]:
    """The package's model in the same loop as theirs."""
    from moe_builders.hub import load_hf_model
    from moe_builders.losses import cross_entropy_sum

    stored, _ = DTYPES[case.dtype]
    model, _ = load_hf_model(case.folder, dtype=TORCH[stored], device=device)
    model.train()

    def loss_of(tokens: Tensor) -> Tensor:
        logits = model(tokens)
        return cross_entropy_sum(logits[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()

    yield plain_step(model, loss_of)


@contextmanager
def ours_recipe(case: Case, device: torch.device) -> Iterator[tuple[Step, Any]]:
    """The recipe's own functions; "fsdp2": sharded over one process, needed or not."""
    import moe_full_finetune as recipe
    from omegaconf import OmegaConf

    from moe_builders.data.batch import collate, shift_labels
    from moe_builders.hub import load_hf_model
    from moe_builders.parallel.grad_norm import GradNorm
    from moe_builders.parallel.sharding import shard_model
    from moe_builders.parallel.world import open_world
    from moe_builders.training.config import check_config
    from moe_builders.training.stepping import Stepper

    stored, computed = DTYPES[case.dtype]
    config = check_config(OmegaConf.create({
        "output_dir": "unused", "dataset": "unused", "optimizer": "unused",
        "base_model": case.folder, "param_dtype": stored, "compute_dtype": computed,
        "max_seq_len": case.length, "batch_size": case.rows, "clip_grad_norm": CLIP,
        "device": case.device,
    }))  # fmt: skip
    with open_world(device=case.device) as world:
        if case.way == "recipe":
            model = recipe.build_model(config, world).model
        else:
            model, _ = load_hf_model(case.folder, dtype=TORCH[stored], device=device)
            shard_model(model, world, compute_dtype=TORCH[computed], reshard_after_forward=True)
        optimizer = adamw(model)
        stepper = Stepper(optimizer, GradNorm())

        def step(tokens: Tensor) -> tuple[Tensor, Tensor]:
            rows = [
                {"tokens": row, "labels": shift_labels(row), "lengths": [len(row)]}
                for row in tokens.tolist()
            ]
            batch = collate(rows, pad_id=0)
            values = recipe.train_step(model, [batch], config, world)
            norm = recipe.update(stepper, None, config)
            return values["loss"], norm

        yield step, (model, optimizer)


def why_not(case: Case, gib: float) -> str | None:
    """A sentence where this way cannot train this case."""
    stored, computed = DTYPES[case.dtype]
    if case.way == "bare" and stored != computed:
        return "computing in another dtype than the weights are stored in takes FSDP2"
    if case.way == "batched_mm":
        fields = COMMON | SHAPES[case.shape][1]
        one = 3 * fields["moe_intermediate_size"] * fields["hidden_size"]
        size = 2 if computed == "bf16" else 4
        needs = case.rows * case.length * fields["num_experts_per_tok"] * one * size / 2**30
        if needs * fields["num_hidden_layers"] > gib:
            return (
                f"it copies an expert's matrices for every assignment: {needs:.0f} GiB a layer, "
                f"kept for backward, and {gib:.0f} are allowed (--gib)"
            )
    return None


def serve(case: Case, pipe: Any) -> None:
    """A worker process: build, then answer "step" and "memory" until told to stop."""
    logging.getLogger("torchao").setLevel(logging.ERROR)  # that it has no GPU kernels here
    torch.set_num_threads(case.threads)
    device = torch.device(case.device)
    sides = {"recipe": ours_recipe, "fsdp2": ours_recipe, "bare": ours_bare}
    with sides.get(case.way, theirs)(case, device) as (step, (model, optimizer)):

        def once(number: int) -> tuple[Tensor, Tensor]:
            stream = torch.Generator().manual_seed(number)
            shape = (case.rows, case.length)
            tokens = torch.randint(0, vocabulary(case.shape), shape, generator=stream)
            # the recipe's batches come from its loader, on the host
            return step(tokens if case.way in ("recipe", "fsdp2") else tokens.to(device))

        pipe.send("ready")
        number = 0
        while (word := pipe.recv()) != "stop":
            if word == "step":
                pipe.send(timed(partial(once, number), device))
            else:
                needed = needed_bytes(model, optimizer)
                above = peak_bytes(partial(once, number), device) - needed["gradients"]
                pipe.send(needed | {"above": above, "resident": resident_bytes()})
            number += 1


def timed(step: Callable[[], tuple[Tensor, Tensor]], device: torch.device) -> dict[str, float]:
    """One step: wall seconds, processor seconds of all threads, loss, gradient norm."""
    values: list[Tensor] = []
    cpu = time.process_time()
    seconds = seconds_of(lambda: values.extend(step()), device)
    cpu = time.process_time() - cpu
    loss, norm = (float(value) for value in values)
    return {"seconds": seconds, "cpu_seconds": cpu, "losses": loss, "norms": norm}


def vocabulary(shape: str) -> int:
    """Tokens are drawn below this."""
    return (COMMON | SHAPES[shape][1])["vocab_size"]


def needed_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state: what no way of training can avoid."""

    def size(tensor: Tensor) -> int:
        return tensor.numel() * tensor.element_size()

    weights = sum(size(p) for p in model.parameters())
    trained = sum(size(p) for p in model.parameters() if p.requires_grad)
    states = (v for state in optimizer.state.values() for v in state.values())
    state = sum(size(v) for v in states if isinstance(v, Tensor))
    return {"weights": weights, "gradients": trained, "state": state}


def write_folder(shape: str, folder: Path) -> None:
    """The random model that every way starts from, as transformers saves it."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**(COMMON | SHAPES[shape][1]))
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)


def measure(cases: list[Case], warmup: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Steps of all ways in turn, every second round backwards; then each one's memory."""
    context = get_context("spawn")
    workers, pipes = [], {}
    lists = ("seconds", "cpu_seconds", "losses", "norms")
    found: dict[str, dict[str, Any]] = {case.way: {n: [] for n in lists} for case in cases}
    try:
        for case in cases:  # one after the other: loading is what needs most memory
            pipes[case.way], theirs_end = context.Pipe()
            workers.append(context.Process(target=serve, args=(case, theirs_end), daemon=True))
            workers[-1].start()
            theirs_end.close()
            pipes[case.way].recv()
        for number in range(warmup + repeats):
            order = list(pipes) if number % 2 == 0 else list(pipes)[::-1]
            for way in order:
                pipes[way].send("step")
                answer = pipes[way].recv()
                for name, value in answer.items():
                    if number >= warmup or name in ("losses", "norms"):  # the first are compared
                        found[way][name].append(value)
        for way, pipe in pipes.items():
            pipe.send("memory")
            found[way]["bytes"] = pipe.recv()
            pipe.send("stop")
    except EOFError:
        raise SystemExit("a worker died; its own message stands above") from None
    finally:
        for pipe in pipes.values():
            pipe.close()
        for worker in workers:
            worker.join(timeout=30)
            worker.kill()
    return found


def check_equal_work(found: dict[str, dict[str, Any]], dtype: str) -> dict[str, float]:
    """Largest relative difference of the first step's loss and gradient norm between the ways."""
    differences = {}
    for name, tolerance in zip(("losses", "norms"), TOLERANCE[dtype], strict=True):
        first = {way: values[name][0] for way, values in found.items()}
        numbers = torch.tensor(
            list(first.values()), dtype=torch.float64
        )  # its max and min keep NaN
        spread = float((numbers.max() - numbers.min()) / numbers.abs().min())
        if not spread <= tolerance:
            raise SystemExit(f"the ways do not do the same work: first {name} are {first}")
        differences[name] = spread
    return differences


def compare(found: dict[str, dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Ratios against the fastest of transformers' ways; above 1: ours is faster."""
    medians = {way: statistics.median(values["seconds"]) for way, values in found.items()}
    best = min((way for way in found if way in THEIRS), key=lambda way: medians[way], default=None)
    result: dict[str, Any] = {"best_of_transformers": best, "ways": {}}
    for way, values in found.items():
        row = {
            "tokens_per_second": tokens / medians[way],
            "above_mib": values["bytes"]["above"] / 2**20,
        }
        if best is not None:
            # of the same round each: what disturbed one has probably disturbed the other
            pairs = zip(found[best]["seconds"], values["seconds"], strict=True)
            ratios = sorted(other / own for other, own in pairs)
            row["speed_ratio"] = statistics.median(ratios)
            row["speed_ratio_range"] = [ratios[0], ratios[-1]]
            # of processor time: steadier than seconds while others use the machine
            spent = zip(found[best]["cpu_seconds"], values["cpu_seconds"], strict=True)
            row["cpu_time_ratio"] = statistics.median(other / own for other, own in spent)
            row["memory_ratio"] = values["bytes"]["above"] / found[best]["bytes"]["above"]
        result["ways"][way] = row
    if "fsdp2" in medians and "recipe" in medians:
        pairs = zip(found["fsdp2"]["seconds"], found["recipe"]["seconds"], strict=True)
        result["fsdp2_time_ratio"] = statistics.median(own / other for own, other in pairs)
        result["fsdp2_memory_ratio"] = (
            found["fsdp2"]["bytes"]["above"] / found["recipe"]["bytes"]["above"]
        )
    return result


def print_table(results: list[dict[str, Any]]) -> None:
    """One line a way; the ratios are against the fastest of transformers' ways."""
    none = float("nan")  # without a way of transformers there is nothing to compare with
    print(f"\n{'shape':15}{'dtype':7}{'way':12}{'tokens/s':>9}{'speed':>8}  {'range':12}"
          f"{'by cpu':>7}{'MiB above':>11}{'memory':>8}")  # fmt: skip
    for result in results:
        summary = result["summary"]
        for way, row in summary["ways"].items():
            low, high = row.get("speed_ratio_range", (none, none))
            print(
                f"{result['shape']:15}{result['dtype']:7}{way:12}"
                f"{row['tokens_per_second']:9.0f}{row.get('speed_ratio', none):8.3f}"
                f"  {low:5.2f}-{high:<6.2f}{row.get('cpu_time_ratio', none):7.3f}"
                f"{row['above_mib']:11.0f}{row.get('memory_ratio', none):8.3f}"
                + " <- transformers' best"
                * (way == summary["best_of_transformers"])
            )
        if "fsdp2_time_ratio" in summary:
            time_ratio, memory_ratio = summary["fsdp2_time_ratio"], summary["fsdp2_memory_ratio"]
            print(f"{'':22}fsdp2 / recipe: time x {time_ratio:.3f}, memory x {memory_ratio:.3f}")
    print(
        "speed: tokens/s over those of transformers' best (more is better); memory: bytes above "
        "weights, gradients and optimizer state over its (less is better)"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    measured = [name for name in SHAPES if name != "tiny"]
    parser.add_argument("--shapes", nargs="+", default=measured, choices=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    parser.add_argument("--ways", nargs="+", default=[*OURS, *THEIRS], choices=[*OURS, *THEIRS])
    parser.add_argument("--rows", type=int, default=4, help="of a batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each way")
    parser.add_argument("--warmup", type=int, default=2, help="steps before, not timed")
    parser.add_argument("--threads", type=int, default=2, help="of torch, in each worker")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--gib", type=float, default=16, help="memory a way may take")
    parser.add_argument("--out", type=Path, help="default: results/train_step_DEVICE.json")
    chosen = parser.parse_args(argv)
    for name in ("rows", "length", "repeats", "warmup", "threads"):
        if getattr(chosen, name) < 1:
            parser.error(f"--{name} is {getattr(chosen, name)}, but must be at least 1")
    here = Path(__file__).parent / "results"
    chosen.out = chosen.out or here / f"train_step_{chosen.device}.json"
    return chosen


def main(argv: list[str] | None = None) -> None:
    """Measure what was chosen, save after each case, print the table at the end."""
    chosen = parse(argv)
    # the profiler's remarks about tensors older than itself
    os.environ |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "KINETO_LOG_LEVEL": "5"}
    report: dict[str, Any] = circumstances(torch.device(chosen.device), chosen.threads)
    report |= {"command": " ".join(sys.argv), "rows": chosen.rows, "length": chosen.length}
    report |= {"warmup": chosen.warmup, "results": [], "skipped": []}
    for shape in chosen.shapes:
        with tempfile.TemporaryDirectory() as folder:
            write_folder(shape, Path(folder))
            for dtype in chosen.dtypes:
                cases = []
                for way in chosen.ways:
                    case = Case(shape, dtype, way, folder, chosen.device, chosen.threads,
                                chosen.rows, chosen.length)  # fmt: skip
                    if reason := why_not(case, chosen.gib):
                        line = f"skipped: {shape} {dtype} {way}: {reason}"
                        report["skipped"].append(line)
                        print(line, flush=True)
                    else:
                        cases.append(case)
                print(f"measuring {shape} {dtype}: {', '.join(c.way for c in cases)}", flush=True)
                found = measure(cases, chosen.warmup, chosen.repeats)
                report["results"].append({
                    "shape": shape, "what": SHAPES[shape][0], "dtype": dtype,
                    "first_step_differs_by": check_equal_work(found, dtype),
                    "summary": compare(found, chosen.rows * chosen.length), "ways": found,
                })  # fmt: skip
                save(report, chosen.out)
    print_table(report["results"])
    print(f"every timing is in {chosen.out}")


if __name__ == "__main__":
    main()
