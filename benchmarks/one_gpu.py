"""The largest full fine-tunes on one GPU: released sizes, real optimizer, the recipe's own step.

    python benchmarks/one_gpu.py                           # on a GPU; ends in 9 minutes
    python benchmarks/one_gpu.py --cases qwen3_30b_a3b --minutes 4
    python benchmarks/one_gpu.py --tiny --device cpu       # does it run?

Random weights made on the device, in bf16 with stochastic rounding, 8-bit AdamW, each parameter
stepped in backward. Twenty steps on the same random rows, so that the loss has to fall. Each case
has a process of its own, so that memory is its own; one that runs out of memory is tried again with
half the rows. Routing is the model's own ("real"), or forced to be even ("balanced"), which is what
others publish.

README.md beside this file says how to read what comes out.
"""

import argparse
import logging
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from measuring import ROOT, Deadline, circumstances, leave_out, save, seconds_of
from torch import nn

sys.path.append(str(ROOT / "recipes"))

import moe_full_finetune as recipe
from omegaconf import OmegaConf

from moe_builders.checkpoint.stream import materialize
from moe_builders.data.batch import Batch, collate, shift_labels
from moe_builders.flops import count_parameters, utilisation
from moe_builders.instantiate import instantiate
from moe_builders.metrics import max_violation
from moe_builders.ops.output_loss import check_way
from moe_builders.parallel.grad_norm import GradNorm
from moe_builders.parallel.sharding import (
    local_shard,
    needs_sharding,
    shard_model,
    widen_router_inputs,
)
from moe_builders.parallel.world import World, open_world
from moe_builders.router_control import replace_routers
from moe_builders.routing import storage_dtype
from moe_builders.training.compiling import compile_layers
from moe_builders.training.config import RecipeConfig, check_config
from moe_builders.training.optimizer import build_optimizer
from moe_builders.training.stepping import build_stepper

FAMILIES = "moe_builders.families"
BALANCED = {"_component_": "moe_builders.routers.ForcedBalanceRouter"}
MODELS = {
    "qwen3_30b_a3b": f"{FAMILIES}.qwen3_moe.qwen3_moe_30b_a3b",
    "olmoe_1b_7b": f"{FAMILIES}.olmoe.olmoe_1b_7b",
    "gpt_oss_20b": f"{FAMILIES}.gpt_oss.gpt_oss_20b",
    "tiny": f"{FAMILIES}.qwen3_moe.qwen3_moe_tiny",
}


@dataclass(frozen=True)
class Case:
    """One fine-tune; plain values, so that it can be sent to a process.

    Attributes:
        name: what it is called.
        model: of ``MODELS``.
        rows, length: of a step.
        routing: "real" or "balanced".
        checkpointing: recompute each layer.
        fsdp2: None: as the recipe decides; True, False: whatever that would be.
        steps, warmup: in all; not timed.
        rate: of learning.
        device, compiled, optimizer: as the command line says.
    """

    name: str
    model: str
    rows: int
    length: int = 4096
    routing: str = "real"
    checkpointing: bool = True
    fsdp2: bool | None = None
    steps: int = 20
    warmup: int = 4
    rate: float = 3e-4
    device: str = "cuda"
    compiled: bool = False
    optimizer: str = "moe_builders.training.low_bit.AdamW8bit"


QWEN3 = Case("qwen3_30b_a3b", "qwen3_30b_a3b", rows=4)
OLMOE = Case("olmoe_1b_7b", "olmoe_1b_7b", rows=4, checkpointing=False)
GPT_OSS = Case("gpt_oss_20b", "gpt_oss_20b", rows=4)
CASES = {
    each.name: each
    for each in (
        QWEN3,
        replace(QWEN3, name="qwen3_30b_a3b, balanced", routing="balanced"),
        # whether FSDP2 shards over one process, on and off: its overhead
        replace(OLMOE, name="olmoe_1b_7b, fsdp2", fsdp2=True),
        replace(OLMOE, name="olmoe_1b_7b, no fsdp2", fsdp2=False),
        GPT_OSS,
        replace(OLMOE, name="olmoe_1b_7b, balanced", routing="balanced"),
        replace(GPT_OSS, name="gpt_oss_20b, balanced", routing="balanced"),
    )
}
TINY = Case("tiny", "tiny", rows=2, length=32, steps=6, warmup=1, rate=1e-2,
            optimizer="moe_builders.training.low_bit.AdamW")  # fmt: skip
TINY_CASES = {
    each.name: each
    for each in (TINY, replace(TINY, name="tiny, balanced, no fsdp2", routing="balanced",
                               fsdp2=False, checkpointing=False))
}  # fmt: skip


def config_of(case: Case) -> RecipeConfig:
    """The recipe's configuration: what a user would write for one GPU."""
    return check_config(OmegaConf.create({
        "output_dir": "unused", "dataset": "unused", "device": case.device,
        "model": {"_component_": MODELS[case.model]},
        "router": BALANCED if case.routing == "balanced" else None,
        "optimizer": {"_component_": case.optimizer, "lr": case.rate},
        "param_dtype": "bf16", "compute_dtype": "bf16", "optimizer_in_bwd": True,
        "clip_grad_norm": None, "max_seq_len": case.length, "batch_size": case.rows,
        "enable_activation_checkpointing": case.checkpointing, "compile": case.compiled,
    }))  # fmt: skip


def build(case: Case, config: RecipeConfig, world: World) -> Any:
    """The recipe's model with random weights; they never lie on the host, which they might fill."""
    with torch.device("meta"):
        model: Any = instantiate(config.model, path="model")
        if config.router is not None:
            replace_routers(model, config.router)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(storage_dtype(name, torch.bfloat16))
    model.activation_checkpointing = config.enable_activation_checkpointing
    model.ac_mode = config.ac_mode
    model.linear_cross_entropy = check_way(config.linear_cross_entropy, world.device)
    if config.compile:
        compile_layers(model.layers)
    shards = case.fsdp2
    if shards is None:
        shards = needs_sharding(model, world, compute_dtype=torch.bfloat16)
    if shards:
        shard_model(
            model, world, compute_dtype=torch.bfloat16,
            reshard_after_forward=config.reshard_after_forward,
        )  # fmt: skip
    else:
        widen_router_inputs(model)
    materialize(model, world.device)
    fill_randomly(model, seed=0)
    return model


@torch.no_grad()
def fill_randomly(model: nn.Module, *, seed: int) -> None:
    """Matrices N(0, 0.02), norms 1, biases and buffers 0, drawn where they lie."""
    some = local_shard(next(model.parameters())).tensor
    stream = torch.Generator(some.device).manual_seed(seed)
    for name, tensor in model.state_dict().items():
        own = local_shard(tensor).tensor
        if not own.is_floating_point():
            continue
        if name.endswith(("norm.weight", "_scale.weight", ".scale", "hidden_scale")):
            own.fill_(1)
        elif name.endswith("bias") or tensor.ndim < 2:
            own.zero_()
        else:
            own.normal_(0, 0.02, generator=stream)


def random_batch(case: Case, vocabulary: int) -> Batch:
    """Rows of random tokens: there is nothing to learn but they themselves."""
    stream = torch.Generator().manual_seed(0)
    rows = torch.randint(0, vocabulary, (case.rows, case.length), generator=stream).tolist()
    return collate(
        [{"tokens": row, "labels": shift_labels(row), "lengths": [len(row)]} for row in rows],
        pad_id=0,
    )


def train(case: Case, tell: Any) -> None:
    """Build, then tell what it is and the values of every step."""
    logging.getLogger("torchao").setLevel(logging.ERROR)
    config, device = config_of(case), torch.device(case.device)
    with open_world(device=case.device) as world:
        model = build(case, config, world)
        optimizer = build_optimizer(config.optimizer, model)
        stepper = build_stepper(
            optimizer, GradNorm(), device, in_backward=config.optimizer_in_bwd, offload=False
        )
        batch = random_batch(case, model.tok_embeddings.num_embeddings)
        used = utilisation(model, peak_tflops=None, compute_dtype=torch.bfloat16, device=device,
                           num_devices=1)  # fmt: skip
        counts = count_parameters(model)
        tell({"parameters": counts.total, "active": counts.active,
              "sharded": type(next(model.parameters()).data).__name__ == "DTensor"})  # fmt: skip
        tokens, pairs = batch.num_real, batch.attended_pairs
        for number in range(case.steps):
            if number == case.warmup and device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            values: dict[str, Any] = {}

            def step() -> None:
                found = recipe.train_step(model, [batch], config, world)
                values.update(found, norm=recipe.update(stepper, None, config))  # noqa: B023

            seconds = seconds_of(step, device)
            mfu = used and used.mfu(num_tokens=tokens, attended=pairs, seconds=seconds)
            tell({
                "seconds": seconds, "loss": float(values["loss"]), "norm": float(values["norm"]),
                "max_violation": float(max_violation(values["load"][0]).max()), "mfu": mfu,
            } | _peaks(device))  # fmt: skip


def _peaks(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return {}
    return {"peak_bytes": torch.cuda.max_memory_allocated(device),
            "reserved_bytes": torch.cuda.max_memory_reserved(device)}  # fmt: skip


def serve(case: Case, pipe: Any) -> None:
    """A process: values come through the pipe as they are made, the end as a word."""
    try:
        train(case, pipe.send)
    except torch.OutOfMemoryError as error:
        pipe.send(f"out of memory: {str(error).splitlines()[0]}")
    else:
        pipe.send("done")


def run_case(case: Case, deadline: Deadline) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """("done" or why not, what the model is, every step), in a process of its own."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    worker = context.Process(target=serve, args=(case, theirs), daemon=True)
    worker.start()
    theirs.close()
    said: list[Any] = []
    word = "its time was over"
    try:
        while ours.poll(min(deadline.left, 3600.0)):
            answer = ours.recv()
            if isinstance(answer, str):
                word = answer
                break
            said.append(answer)
    except EOFError:
        word = "its process died; its own message stands above"
    finally:
        if word == "done":
            worker.join(timeout=30)
        worker.kill()
        worker.join()
        ours.close()
    return word, (said[0] if said else {}), said[1:]


def summary(case: Case, steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the table shows; of the steps after the warm-up."""
    timed = steps[case.warmup :]
    seconds = [step["seconds"] for step in timed]
    found: dict[str, Any] = {
        "timed_steps": len(timed), "loss_first": steps[0]["loss"], "loss_last": steps[-1]["loss"],
        "falls": steps[-1]["loss"] < steps[0]["loss"],
    }  # fmt: skip
    if timed:
        middle = statistics.median(seconds)
        tokens = case.rows * case.length
        found |= {
            "seconds": middle, "tokens_per_second": tokens / middle,
            "tokens_per_second_range": [tokens / max(seconds), tokens / min(seconds)],
            "max_violation": statistics.median(step["max_violation"] for step in timed),
        }  # fmt: skip
        if timed[0]["mfu"] is not None:
            found["mfu"] = statistics.median(step["mfu"] for step in timed)
        if "peak_bytes" in timed[0]:
            found["peak_bytes"] = max(step["peak_bytes"] for step in timed)
            found["reserved_bytes"] = max(step["reserved_bytes"] for step in timed)
    return found


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, a row a case."""
    head = ("case", "routing", "rows × length", "FSDP2", "tokens/s", "range", "MFU", "peak GB",
            "reserved GB", "loss", "max_violation")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for each in results:
        case, found = each["case"], each["summary"]
        low, high = found.get("tokens_per_second_range", (None, None))
        cells = (
            case["name"], case["routing"], f"{case['rows']} × {case['length']}",
            "yes" if each["model"]["sharded"] else "no",
            _shown(found.get("tokens_per_second"), "{:.0f}"),
            f"{_shown(low, '{:.0f}')}–{_shown(high, '{:.0f}')}",
            _shown(found.get("mfu"), "{:.1%}"), _gb(found.get("peak_bytes")),
            _gb(found.get("reserved_bytes")),
            f"{found['loss_first']:.2f} → {found['loss_last']:.2f}",
            _shown(found.get("max_violation"), "{:.2f}"),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _gb(value: int | None) -> str:
    return "–" if value is None else f"{value / 1e9:.1f}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a trial, not a measurement")
    parser.add_argument("--cases", nargs="+", help=f"of: {'; '.join(CASES)}")
    parser.add_argument("--rows", type=int, help="of a step; default: the case's own")
    parser.add_argument("--length", type=int, help="tokens of a row; default: the case's own")
    parser.add_argument("--steps", type=int, help="default: the case's own")
    parser.add_argument("--compile", action="store_true", help="torch.compile each layer")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--minutes", type=float, default=8.5, help="then stop")
    parser.add_argument("--out", type=Path, help="default: results/one_gpu.json")
    args = parser.parse_args(argv)
    known = TINY_CASES if args.tiny else CASES
    if unknown := set(args.cases or ()) - set(known):
        parser.error(f"--cases holds {', '.join(sorted(unknown))}, but must be of: "
                     f"{'; '.join(known)}")  # fmt: skip
    changes = {"device": args.device, "compiled": args.compile} | {
        key: getattr(args, key) for key in ("rows", "length", "steps") if getattr(args, key)
    }
    args.chosen = [replace(known[name], **changes) for name in args.cases or known]
    args.out = args.out or Path(__file__).parent / "results/one_gpu.json"
    return args


def main(argv: list[str] | None = None) -> None:
    """Run what was chosen, save after each case, print the table at the end."""
    args = parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: add --tiny --device cpu to try the script")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    deadline = Deadline(args.minutes)
    report: dict[str, Any] = circumstances(torch.device(args.device), torch.get_num_threads())
    report |= {"command": " ".join(sys.argv), "results": [], "skipped": []}
    for number, case in enumerate(args.chosen):
        # the first of n may take 3 / (n + 2) of what is left: it compiles optimizer steps that the
        # next ones find in a cache. What one does not need, they have
        share = Deadline(3 * deadline.left / (len(args.chosen) - number + 2) / 60)
        word = "the time was over before it began"
        while share.left > 0 and deadline.left > 0:
            print(f"measuring {case.name}: {case.rows} rows of {case.length}", flush=True)
            word, model, steps = run_case(case, share if share.left < deadline.left else deadline)
            if steps:
                report["results"].append({
                    "case": asdict(case), "ended": word, "model": model,
                    "summary": summary(case, steps), "steps": steps,
                })  # fmt: skip
            if not word.startswith("out of memory") or case.rows == 1:
                break
            leave_out(report, f"{case.name}: {word}; tried again with half the rows")
            case = replace(case, rows=case.rows // 2)
        if word != "done":
            leave_out(report, f"{case.name}, or the rest of it: {word}")
        save(report, args.out)
    print(table(report["results"]))
    print(f"every step is in {args.out}")


if __name__ == "__main__":
    main()
