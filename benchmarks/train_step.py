"""Whole optimizer steps, ours beside transformers': tokens/s, and memory above what must be there.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --device cuda          # released models with fewer layers

Each way of training lives in a process of its own, loads the same folder, and waits to be asked
for one step; they are asked in turn, so that whatever else the machine does hits all alike. A step
is forward, mean cross-entropy, backward, clipping to a norm of 1, fused AdamW; on the same random
tokens. That the work is equal is checked: first loss and first gradient norm must agree. On a GPU,
whose memory all share, transformers' ways run alone first, and the fastest takes part.

README.md beside this file says how to read what comes out.
"""

import argparse
import json
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
from measuring import (
    ROOT,
    Deadline,
    circumstances,
    leave_out,
    peak_bytes,
    resident_bytes,
    save,
    seconds_of,
)
from torch import Tensor, nn
from torch.nn import functional

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
# Released models with fewer layers, and with as much less of the vocabulary: the output's part of
# the work is what it is in the whole model. (a config.json of tests/assets, layers)
PUBLIC: dict[str, tuple[str, int]] = {
    "qwen3_30b_a3b": ("Qwen3-30B-A3B", 4),
    "mixtral_8x7b": ("Mixtral-8x7B-v0.1", 1),
    "olmoe_1b_7b": ("OLMoE-1B-7B-0924", 5),
    "deepseek_v2_lite": ("DeepSeek-V2-Lite", 4),
    "gpt_oss_20b": ("gpt-oss-20b", 2),
}
# (weights are stored in, computed in)
DTYPES = {"fp32": ("fp32", "fp32"), "bf16": ("bf16", "bf16"), "mixed": ("fp32", "bf16")}
TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16}
# loss and gradient norm of the first step may differ by this share of their size; bf16 rounds
# routing scores, so that a few tokens go to other experts
TOLERANCE = {"fp32": (1e-4, 1e-3), "bf16": (1e-3, 2e-2), "mixed": (1e-3, 2e-2)}
OURS = ("recipe", "fsdp2", "bare")
THEIRS = ("grouped_mm", "batched_mm", "eager")
RATE, CLIP = 1e-5, 1.0
BALANCED = {"_component_": "moe_builders.routers.ForcedBalanceRouter"}
EVEN = ", balanced"  # behind the name of one of our ways: its routing is forced to be even


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

    @property
    def kind(self) -> str:
        """The way, whatever its routing."""
        return self.way.removesuffix(EVEN)

    @property
    def router(self) -> dict[str, str] | None:
        """In place of the model's own."""
        return BALANCED if self.way.endswith(EVEN) else None


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
    # gpt-oss's attention sinks have no other way that needs no further package
    attention = "eager" if case.shape == "gpt_oss_20b" else "sdpa"
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        case.folder, dtype=stored, attn_implementation=attention, experts_implementation=case.way
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


def open_folder(case: Case, device: torch.device) -> Any:
    """The folder's model, neither sharded nor cast: routers in the weights' dtype, as theirs."""
    from moe_builders.base_model import open_base_model
    from moe_builders.hub import load_hf_model

    dtype = TORCH[DTYPES[case.dtype][0]]
    if case.router is None:
        return load_hf_model(case.folder, dtype=dtype, device=device)[0]
    base = open_base_model(case.folder, None, dtype=dtype, device=device, seed=0, init_std=None,
                           router=case.router)  # fmt: skip
    return base.fill(device).to(dtype)


@contextmanager
def ours_bare(case: Case, device: torch.device) -> Iterator[tuple[Step, Any]]:
    """The package's model in the same loop as theirs."""
    from moe_builders.losses import IGNORE_INDEX

    model = open_folder(case, device)
    model.train()

    def loss_of(tokens: Tensor) -> Tensor:
        labels = functional.pad(tokens[:, 1:], (0, 1), value=IGNORE_INDEX)
        return model(tokens, labels=labels, divisor=tokens.new_tensor(tokens[:, 1:].numel()))

    yield plain_step(model, loss_of)


@contextmanager
def ours_recipe(case: Case, device: torch.device) -> Iterator[tuple[Step, Any]]:
    """The recipe's own functions; "fsdp2": sharded over one process, needed or not."""
    import moe_full_finetune as recipe
    from omegaconf import OmegaConf

    from moe_builders.data.batch import collate, shift_labels
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
        "device": case.device, "router": case.router,
    }))  # fmt: skip
    with open_world(device=case.device) as world:
        if case.kind == "recipe":
            model = recipe.build_model(config, world).model
        else:
            model = open_folder(case, device)
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
    if case.kind == "bare" and stored != computed:
        return "computing in another dtype than the weights are stored in takes FSDP2"
    if case.router is not None and case.shape == "gpt_oss_20b":
        return "its gate has a bias, for which the even router has no place"
    if case.way == "batched_mm" and case.shape in PUBLIC:
        return "it copies an expert's matrices for every assignment: far more than a GPU's memory"
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
    """A worker process: what it says, or why it cannot go on where that is the memory's size."""
    try:
        answer_steps(case, pipe)
    except torch.OutOfMemoryError as error:
        pipe.send(f"out of memory: {str(error).splitlines()[0]}")


def answer_steps(case: Case, pipe: Any) -> None:
    """Build, then answer "step" and "memory" until told to stop."""
    logging.getLogger("torchao").setLevel(logging.ERROR)  # that it has no GPU kernels here
    torch.set_num_threads(case.threads)
    device = torch.device(case.device)
    sides = {"recipe": ours_recipe, "fsdp2": ours_recipe, "bare": ours_bare}
    with sides.get(case.kind, theirs)(case, device) as (step, (model, optimizer)):

        def once(number: int) -> tuple[Tensor, Tensor]:
            stream = torch.Generator().manual_seed(number)
            shape = (case.rows, case.length)
            tokens = torch.randint(0, vocabulary(case.shape), shape, generator=stream)
            # the recipe's batches come from its loader, on the host
            return step(tokens if case.kind in ("recipe", "fsdp2") else tokens.to(device))

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
    if shape in PUBLIC:
        return public_fields(shape)["vocab_size"]
    return (COMMON | SHAPES[shape][1])["vocab_size"]


def public_fields(shape: str) -> dict[str, Any]:
    """A released config.json, cut to fewer layers and a smaller vocabulary."""
    name, layers = PUBLIC[shape]
    fields = json.loads((ROOT / f"tests/assets/configs/{name}.json").read_text())
    whole = fields["num_hidden_layers"]
    tokens = fields["vocab_size"] * layers // whole // 64 * 64
    if "layer_types" in fields:
        fields["layer_types"] = fields["layer_types"][:layers]
    # ids of tokens that may be cut off, and how a folder stores what is random here anyway
    for key in ("quantization_config", "bos_token_id", "eos_token_id", "pad_token_id"):
        fields.pop(key, None)
    return fields | {"num_hidden_layers": layers, "vocab_size": tokens, "pad_token_id": None}


def needed_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state: what no way of training can avoid."""

    def size(tensor: Tensor) -> int:
        return tensor.numel() * tensor.element_size()

    weights = sum(size(p) for p in model.parameters())
    trained = sum(size(p) for p in model.parameters() if p.requires_grad)
    states = (v for state in optimizer.state.values() for v in state.values())
    state = sum(size(v) for v in states if isinstance(v, Tensor))
    return {"weights": weights, "gradients": trained, "state": state}


def write_folder(shape: str, folder: Path, device: str) -> None:
    """The random model that every way starts from, as transformers saves it."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    if shape not in PUBLIC:
        config = transformers.Qwen3MoeConfig(**(COMMON | SHAPES[shape][1]))
        transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
        return
    fields = public_fields(shape)
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device(device):  # drawn there: billions of numbers
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


class NoRoom(Exception):
    """A way does not fit beside the others."""


def heard(pipe: Any, way: str) -> Any:
    """What a worker answers.

    Raises:
        NoRoom: that its memory is full.
    """
    answer = pipe.recv()
    if isinstance(answer, str) and answer != "ready":
        raise NoRoom(f"{way}: {answer}")
    return answer


def choose_theirs(
    cases: list[Case], tell: Callable[[str], None]
) -> tuple[list[Case], dict[str, float]]:
    """Let transformers' ways run alone and keep the fastest; the seconds of a step of each."""
    seconds: dict[str, float] = {}
    for case in cases:
        if case.way not in THEIRS:
            continue
        try:
            found = measure([case], 1, 2)
        except NoRoom as error:
            tell(f"{case.shape} {case.dtype} {error}")
        else:
            seconds[case.way] = statistics.median(found[case.way]["seconds"])
    best = min(seconds, key=lambda way: seconds[way], default=None)
    return [case for case in cases if case.way not in THEIRS or case.way == best], seconds


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
            heard(pipes[case.way], case.way)
        for number in range(warmup + repeats):
            order = list(pipes) if number % 2 == 0 else list(pipes)[::-1]
            for way in order:
                pipes[way].send("step")
                answer = heard(pipes[way], way)
                for name, value in answer.items():
                    if number >= warmup or name in ("losses", "norms"):  # the first are compared
                        found[way][name].append(value)
        for way, pipe in pipes.items():
            pipe.send("memory")
            found[way]["bytes"] = heard(pipe, way)
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
        # an even routing is another model
        first = {way: v[name][0] for way, v in found.items() if not way.endswith(EVEN)}
        if not first:
            continue
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
        if best is not None and not way.endswith(EVEN):
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
    print(f"\n{'shape':15}{'dtype':7}{'way':17}{'tokens/s':>9}{'speed':>8}  {'range':12}"
          f"{'by cpu':>7}{'MiB above':>11}{'memory':>8}")  # fmt: skip
    for result in results:
        summary = result["summary"]
        for way, row in summary["ways"].items():
            low, high = row.get("speed_ratio_range", (none, none))
            print(
                f"{result['shape']:15}{result['dtype']:7}{way:17}"
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
        "weights, gradients and optimizer state over its (less is better). Even routing is not "
        "compared: transformers' cannot be forced"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, *PUBLIC])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--ways", nargs="+", choices=[*OURS, *THEIRS])
    parser.add_argument("--routing", nargs="+", choices=["real", "balanced"],
                        help="balanced: the first of ours once more, forced to be even; default "
                        "on a GPU: both")  # fmt: skip
    parser.add_argument("--rows", type=int, default=4, help="of a batch")
    parser.add_argument("--length", type=int, help="tokens of a row")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each way")
    parser.add_argument("--warmup", type=int, default=2, help="steps before, not timed")
    parser.add_argument("--threads", type=int, default=2, help="of torch, in each worker")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--gib", type=float, default=16, help="memory a way may take")
    parser.add_argument("--minutes", type=float, help="then stop; default on a GPU: 8.5")
    parser.add_argument("--out", type=Path, help="default: results/train_step_DEVICE.json")
    chosen = parser.parse_args(argv)
    gpu = chosen.device == "cuda"
    small = [name for name in SHAPES if name != "tiny"]
    chosen.shapes = chosen.shapes or (list(PUBLIC) if gpu else small)
    chosen.dtypes = chosen.dtypes or (["bf16"] if gpu else ["fp32", "bf16"])
    ours = ["recipe", "bare"] if gpu else OURS  # each has the whole model in the same memory
    chosen.ways = chosen.ways or [*ours, *THEIRS]
    chosen.routing = chosen.routing or (["real", "balanced"] if gpu else ["real"])
    chosen.length = chosen.length or (4096 if gpu else 512)
    chosen.minutes = chosen.minutes or (8.5 if gpu else None)
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
    deadline, slowest, wrong = Deadline(chosen.minutes), 0.0, []

    for shape in chosen.shapes:
        if deadline.left <= slowest and slowest:
            leave_out(report, f"{shape}: too little is left of the {chosen.minutes:g} minutes")
            continue
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            write_folder(shape, Path(folder), chosen.device)
            for dtype in chosen.dtypes:
                cases = []
                for way in ways_of(chosen):
                    case = Case(shape, dtype, way, folder, chosen.device, chosen.threads,
                                chosen.rows, chosen.length)  # fmt: skip
                    if reason := why_not(case, chosen.gib):
                        leave_out(report, f"{shape} {dtype} {way}: {reason}")
                    else:
                        cases.append(case)
                alone: dict[str, float] = {}
                if chosen.device == "cuda":
                    cases, alone = choose_theirs(cases, partial(leave_out, report))
                print(f"measuring {shape} {dtype}: {', '.join(c.way for c in cases)}", flush=True)
                try:
                    found = measure(cases, chosen.warmup, chosen.repeats)
                    differs = check_equal_work(found, dtype)
                except NoRoom as error:
                    leave_out(report, f"{shape} {dtype}: {error}")
                    continue
                except SystemExit as error:
                    if chosen.device == "cpu":
                        raise
                    wrong.append(f"{shape} {dtype}: {error}")  # the other shapes can be measured
                    leave_out(report, wrong[-1])
                    continue
                what = SHAPES[shape][0] if shape in SHAPES else "{}, {} layers".format(
                    *PUBLIC[shape])  # fmt: skip
                report["results"].append({
                    "shape": shape, "what": what, "dtype": dtype,
                    "first_step_differs_by": differs, "seconds_alone": alone,
                    "summary": compare(found, chosen.rows * chosen.length), "ways": found,
                })  # fmt: skip
                save(report, chosen.out)
        slowest = max(slowest, time.perf_counter() - started)
    save(report, chosen.out)
    print_table(report["results"])
    print(f"every timing is in {chosen.out}")
    if wrong:
        raise SystemExit("; ".join(wrong))


def ways_of(chosen: argparse.Namespace) -> list[str]:
    """Those that were asked for, and the first of ours once more; theirs cannot be made even.

    One alone: on a GPU each has the whole model in the same memory.
    """
    ways = list(chosen.ways) if "real" in chosen.routing else []
    if "balanced" in chosen.routing:
        ways += [f"{way}{EVEN}" for way in chosen.ways if way in OURS][:1]
    return ways


if __name__ == "__main__":
    main()
