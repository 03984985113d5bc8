"""Memory, traffic and expected time of a step on 8 to 1024 GPUs: computed, nothing is run.

    python benchmarks/scaling.py                     # docs/scaling.md's tables, a minute or two
    python benchmarks/scaling.py --models 30B --gpus 8 64

Every number follows from ``moe_builders.step_plan`` and the assumptions below.
"""

import argparse
import functools
from dataclasses import dataclass

import torch

from moe_builders.decoder import MoEDecoder
from moe_builders.errors import InputError
from moe_builders.families.deepseek_v3 import deepseek_v3_671b
from moe_builders.families.qwen3_moe import qwen3_moe_30b_a3b, qwen3_moe_235b_a22b
from moe_builders.parallel.plan import MeshShape
from moe_builders.step_plan import StepPlan, StepSettings, plan_step

MODELS = {
    "30B": ("Qwen3-30B-A3B", qwen3_moe_30b_a3b),
    "235B": ("Qwen3-235B-A22B", qwen3_moe_235b_a22b),
    "671B": ("DeepSeek-V3", deepseek_v3_671b),
}
GPUS = (8, 16, 64, 256, 1024)
EP = (1, 8, 16, 32, 64)
COPIES = (1, 2, 4, 8, 16)
EIGHT_BITS = {"_component_": "moe_builders.training.low_bit.AdamW8bit"}
STORAGE = {
    "fp32, AdamW": {},
    "bf16, 8 bits": {"param_dtype": torch.bfloat16, "optimizer": EIGHT_BITS},
    "the same in backward": {
        "param_dtype": torch.bfloat16, "optimizer": EIGHT_BITS, "in_backward": True,
    },
}  # fmt: skip
RUN = {"batch_size": 1, "seq_len": 4096, "packed": True, "checkpointing": True}

MESHES = 64, "bf16, 8 bits"  # the candidates that are all shown

NODE = 8  # GPUs
H100, H200 = 80e9, 141e9  # bytes
USABLE = 0.92  # the rest: context, buffers of the collectives, fragmentation
PEAK, SHARE = 989e12, 0.4  # FLOP/s of dense bf16 products (vendor), and what of it is reached
NVLINK, NETWORK = 450e9, 50e9  # bytes a second that a GPU sends inside and out of its node
HEADER = (
    "GPUs", "storage", "R × S × E", "held", "peak", "fits", "inside", "outside", "compute",
    "step, s",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """One plan in numbers: bytes and seconds of a GPU."""

    plan: StepPlan
    storage: str

    @property
    def fits(self) -> str:
        """The smaller kind of GPU that is enough."""
        peak = self.plan.memory.peak
        return "H100" if peak <= USABLE * H100 else "H200" if peak <= USABLE * H200 else "no"

    @property
    def inside(self) -> float:
        """Bytes that a GPU sends inside its node."""
        return sum(c.sent_inside(self.plan.settings.mesh, node_size=NODE)
                   for c in self.plan.collectives)  # fmt: skip

    @property
    def outside(self) -> float:
        """Bytes that a GPU sends out of its node."""
        return sum(c.sent_outside(self.plan.settings.mesh, node_size=NODE)
                   for c in self.plan.collectives)  # fmt: skip

    @property
    def compute(self) -> float:
        """Seconds, if SHARE of the peak is reached throughout."""
        return self.plan.step_flops / (PEAK * SHARE)

    @property
    def seconds(self) -> tuple[float, float]:
        """All weights and gradients travel while something is computed; nothing does."""
        hidden, waited = 0.0, 0.0
        for each in self.plan.collectives:
            mesh = self.plan.settings.mesh
            took = max(
                each.sent_inside(mesh, node_size=NODE) / NVLINK,
                each.sent_outside(mesh, node_size=NODE) / NETWORK,
            )
            hidden, waited = hidden + took * (not each.waits), waited + took * each.waits
        return max(self.compute, hidden) + waited, self.compute + hidden + waited

    def cells(self) -> tuple[str, ...]:
        """A row of the table."""
        mesh, memory = self.plan.settings.mesh, self.plan.memory
        low, high = self.seconds
        return (
            str(mesh.size), self.storage, f"{mesh.dp_replicate} × {mesh.dp_shard} × {mesh.ep}",
            f"{memory.held / 1e9:.1f}", f"{memory.peak / 1e9:.1f}", self.fits,
            f"{self.inside / 1e9:.1f}", f"{self.outside / 1e9:.1f}", f"{self.compute:.2f}",
            f"{low:.2f}–{high:.2f}",
        )  # fmt: skip


@functools.cache
def model_of(name: str) -> MoEDecoder:
    """On the meta device."""
    with torch.device("meta"):
        return MODELS[name][1]()


def outcomes(name: str, size: int, storage: str) -> list[Outcome]:
    """Every mesh of the candidates that this many GPUs can make."""
    found = []
    for ep in EP:
        for copies in COPIES:
            if size % (ep * copies) or (copies > 1 and size // copies < 64):
                continue
            mesh = MeshShape(copies, size // ep // copies, ep)
            settings = StepSettings(mesh=mesh, **RUN, **STORAGE[storage])
            try:
                found.append(Outcome(plan_step(model_of(name), settings), storage))
            except InputError:  # ep does not divide the experts
                continue
    return found


def best(found: list[Outcome]) -> Outcome:
    """The fastest that fits the smaller GPU, else the larger one; else the one that needs least.

    Fastest: by the sum of both bounds.
    """
    for kind in ("H100", "H200"):
        fitting = [each for each in found if each.fits == kind]
        if fitting:
            return min(fitting, key=lambda each: sum(each.seconds))
    return min(found, key=lambda each: each.plan.memory.peak)


def table(name: str, gpus: tuple[int, ...] = GPUS) -> str:
    """One model's, as Markdown."""
    rows = [best(outcomes(name, size, storage)).cells() for size in gpus for storage in STORAGE]
    return _markdown(HEADER, rows)


def meshes_table(name: str, size: int, storage: str) -> str:
    """Every mesh that was looked at, as Markdown."""
    return _markdown(HEADER, [each.cells() for each in outcomes(name, size, storage)])


def _markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def tables(models: list[str], gpus: tuple[int, ...]) -> str:
    """What docs/scaling.md shows between its marks."""
    parts = [f"### {MODELS[name][0]}\n\n{table(name, gpus)}\n" for name in models]
    size, storage = MESHES
    rows = meshes_table("235B", size, storage)
    return "\n".join([*parts, f"### Meshes of {size} GPUs, {MODELS['235B'][0]}\n\n{rows}\n"])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--gpus", nargs="+", type=int, default=list(GPUS))
    args = parser.parse_args()
    print(tables(args.models, tuple(args.gpus)))


if __name__ == "__main__":
    main()
