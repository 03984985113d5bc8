"""What a step takes at its worst: what the plan says, beside what the allocator saw.

    python benchmarks/memory.py                            # three small shapes, on the CPU
    python benchmarks/memory.py --device cuda              # released sizes with fewer layers
    python benchmarks/memory.py --shapes tiny --length 64  # does it run?

The recipe's own model, step and update on one process, random weights and tokens; the plan is
``moe_builders.step_plan``, which sees the configuration alone. Nothing is timed: other processes
do not disturb it.

README.md beside this file says how to read what comes out.
"""

import argparse
import gc
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measuring import ROOT, Deadline, circumstances, leave_out, peak_bytes, save
from torch import Tensor

sys.path.append(str(ROOT / "recipes"))

import moe_full_finetune as recipe
from omegaconf import OmegaConf

from moe_builders.data.batch import collate, shift_labels
from moe_builders.instantiate import instantiate
from moe_builders.ops.output_loss import check_way
from moe_builders.parallel.grad_norm import GradNorm
from moe_builders.parallel.plan import MeshShape
from moe_builders.parallel.world import open_world
from moe_builders.step_plan import Memory, StepSettings, plan_step
from moe_builders.training.config import DTYPES, check_config
from moe_builders.training.optimizer import build_optimizer
from moe_builders.training.stepping import build_stepper

QWEN3, OLMOE, MIXTRAL = (
    f"moe_builders.families.{name}" for name in ("qwen3_moe.qwen3_moe", "olmoe.olmoe",
                                                "mixtral.mixtral")
)  # fmt: skip
SMALL = {
    "_component_": QWEN3, "vocab_size": 8192, "embed_dim": 512, "num_layers": 4, "num_heads": 8,
    "num_kv_heads": 4, "head_dim": 64, "max_seq_len": 2048, "rope_base": 10000.0,
}  # fmt: skip
CPU_SHAPES: dict[str, dict[str, Any]] = {  # those of train_step.py
    "e8_k2": SMALL | {"num_experts": 8, "experts_per_token": 2, "expert_hidden_dim": 1024},
    "e64_k8": SMALL | {"num_experts": 64, "experts_per_token": 8, "expert_hidden_dim": 256},
    "e64_k6_dense1": SMALL | {
        "num_experts": 64, "experts_per_token": 6, "expert_hidden_dim": 256,
        "dense_layers": [0], "intermediate_dim": 1536,
    },
}  # fmt: skip
GPU_SHAPES: dict[str, dict[str, Any]] = {  # released sizes, fewer layers
    "qwen3_30b_a3b, 6 layers": {
        "_component_": QWEN3, "vocab_size": 151936, "embed_dim": 2048, "num_layers": 6,
        "num_heads": 32, "num_kv_heads": 4, "head_dim": 128, "num_experts": 128,
        "experts_per_token": 8, "expert_hidden_dim": 768, "max_seq_len": 40960,
    },
    "olmoe_1b_7b, 8 layers": {
        "_component_": OLMOE, "vocab_size": 50304, "embed_dim": 2048, "num_layers": 8,
        "num_heads": 16, "num_experts": 64, "experts_per_token": 8, "expert_hidden_dim": 1024,
        "max_seq_len": 4096,
    },
    "mixtral_8x7b, 2 layers": {
        "_component_": MIXTRAL, "vocab_size": 32000, "embed_dim": 4096, "num_layers": 2,
        "num_heads": 32, "num_kv_heads": 8, "num_experts": 8, "experts_per_token": 2,
        "expert_hidden_dim": 14336, "max_seq_len": 32768,
    },
}  # fmt: skip
TINY = {
    "tiny": SMALL | {
        "num_experts": 8, "experts_per_token": 2, "expert_hidden_dim": 64, "embed_dim": 64,
        "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "vocab_size": 256,
    },
}  # fmt: skip
SHAPES = CPU_SHAPES | GPU_SHAPES | TINY
KINDS = ("plain", "checkpointed", "accumulated", "in_backward")
EIGHT_BIT = {"_component_": "moe_builders.training.low_bit.AdamW8bit", "lr": 1e-5}
ADAMW = {"_component_": "torch.optim.AdamW", "lr": 1e-5, "fused": True}


@dataclass(frozen=True)
class Case:
    """One model and one way of training it.

    Attributes:
        shape: of ``SHAPES``.
        dtype: of storage and of computing.
        kind: of ``KINDS``.
        rows, length: of a micro-batch.
        device: where.
    """

    shape: str
    dtype: str
    kind: str
    rows: int
    length: int
    device: str

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step."""
        return 2 if self.kind == "accumulated" else 1

    @property
    def optimizer(self) -> dict[str, Any]:
        """On a GPU the one that a bf16 model is trained with; a CPU would compile it for minutes.

        The recipe refuses torch's own for bf16 weights, which round its updates away: here it only
        has to take its room.
        """
        return EIGHT_BIT if self.device == "cuda" and self.dtype == "bf16" else ADAMW

    def config(self) -> Any:
        """The recipe's configuration."""
        in_backward = self.kind == "in_backward"
        return check_config(OmegaConf.create({
            "output_dir": "unused", "dataset": "unused", "model": SHAPES[self.shape],
            "optimizer": self.optimizer, "param_dtype": self.dtype, "compute_dtype": self.dtype,
            "max_seq_len": self.length, "batch_size": self.rows, "device": self.device,
            "gradient_accumulation_steps": self.accumulation, "optimizer_in_bwd": in_backward,
            "clip_grad_norm": None if in_backward else 1.0,
            "enable_activation_checkpointing": self.kind == "checkpointed",
        }))  # fmt: skip


def planned(case: Case) -> Memory:
    """What the plan says, from the configuration."""
    with torch.device("meta"):
        model: Any = instantiate(SHAPES[case.shape], path="model")
    way = case.config().linear_cross_entropy
    model.linear_cross_entropy = check_way(way, torch.device(case.device))
    dtype = DTYPES[case.dtype]
    settings = StepSettings(
        mesh=MeshShape(1, 1, 1), param_dtype=dtype, compute_dtype=dtype, optimizer=case.optimizer,
        batch_size=case.rows, seq_len=case.length, accumulation=case.accumulation,
        checkpointing=case.kind == "checkpointed", in_backward=case.kind == "in_backward",
    )  # fmt: skip
    settings = replace(settings, fused_norms=case.device == "cuda")
    return plan_step(model, settings).memory


def measured(case: Case) -> dict[str, int]:
    """Bytes held before a step, and most of all in one."""
    config, device = case.config(), torch.device(case.device)
    torch.manual_seed(0)
    with open_world(device=case.device) as world:
        model = recipe.build_model(config, world).model
        if case.optimizer is ADAMW:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        else:
            optimizer = build_optimizer(config.optimizer, model)
        stepper = build_stepper(
            optimizer, GradNorm(), device, in_backward=config.optimizer_in_bwd, offload=False
        )
        vocabulary = SHAPES[case.shape]["vocab_size"]

        def batch() -> Any:
            tokens = torch.randint(0, vocabulary, (case.rows, case.length)).tolist()
            return collate(
                [{"tokens": row, "labels": shift_labels(row), "lengths": [len(row)]}
                 for row in tokens], pad_id=0,
            )  # fmt: skip

        def step() -> None:
            recipe.train_step(model, [batch() for _ in range(case.accumulation)], config, world)
            recipe.update(stepper, None, config)

        step()  # makes the states
        above = peak_bytes(step, device)
        held = sum(_bytes(p) for p in model.parameters())
        states = sum(
            _bytes(value) for state in optimizer.state.values() for value in state.values()
            if isinstance(value, Tensor)
        )  # fmt: skip
        model.apply(_forget)
    return {"held": held + states, "above": above, "peak": held + states + above}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _forget(module: Any) -> None:
    if hasattr(module, "last_routing"):
        module.last_routing = None


def compare(case: Case) -> dict[str, Any]:
    """Both, and plan over measurement."""
    memory = planned(case)
    gc.collect()
    if case.device == "cuda":
        torch.cuda.empty_cache()
    real = measured(case)
    above = memory.peak - memory.parameters - memory.states
    return {
        **asdict(case), "planned": asdict(memory), "planned_peak": memory.peak, "measured": real,
        "ratio": memory.peak / real["peak"], "ratio_above": above / real["above"],
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, a row a case."""
    head = ("shape", "dtype", "kind", "planned MiB", "measured MiB", "ratio", "of what is above "
            "weights and states")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for each in results:
        lines.append(
            f"| {each['shape']} | {each['dtype']} | {each['kind']} | "
            f"{each['planned_peak'] / 2**20:.0f} | {each['measured']['peak'] / 2**20:.0f} | "
            f"{each['ratio']:.3f} | {each['ratio_above']:.3f} |"
        )
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line; what is not given follows from the device."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--rows", type=int, default=4, help="of a micro-batch")
    parser.add_argument("--length", type=int, help="tokens of a row")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--minutes", type=float, help="then stop; default on a GPU: 8.5")
    parser.add_argument("--out", type=Path, help="default: results/memory_DEVICE.json")
    args = parser.parse_args(argv)
    gpu = args.device == "cuda"
    args.shapes = args.shapes or list(GPU_SHAPES if gpu else CPU_SHAPES)
    args.dtypes = args.dtypes or (["bf16"] if gpu else ["fp32", "bf16"])
    args.length = args.length or (4096 if gpu else 512)
    args.minutes = args.minutes or (8.5 if gpu else None)
    for name in ("rows", "length", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, but must be at least 1")
    args.out = args.out or Path(__file__).parent / f"results/memory_{args.device}.json"
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure what was chosen, save after each case, print the table at the end."""
    args = parse(argv)
    deadline = Deadline(args.minutes)
    torch.set_num_threads(args.threads)
    os.environ |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "KINETO_LOG_LEVEL": "5"}
    report: dict[str, Any] = circumstances(torch.device(args.device), args.threads)
    report |= {"command": " ".join(sys.argv), "results": [], "skipped": []}
    for case in (
        Case(shape, dtype, kind, args.rows, args.length, args.device)
        for shape in args.shapes for dtype in args.dtypes for kind in args.kinds
    ):  # fmt: skip
        name = f"{case.shape} {case.dtype} {case.kind}"
        reason = f"the {args.minutes} minutes are over" if deadline.left == 0 else None
        if reason is None:
            print(f"measuring {name}", flush=True)
            try:
                report["results"].append(compare(case))
            except torch.OutOfMemoryError as error:
                reason = f"out of memory: {str(error).splitlines()[0]}"
        if reason is not None:
            leave_out(report, f"{name}: {reason}")
        save(report, args.out)
    print(table(report["results"]))
    print(f"every number is in {args.out}")


if __name__ == "__main__":
    main()
