"""What a run would hold, send and compute on any number of processes; nothing is started.

    tune run moe_sharding_plan --config qwen3_moe/30B_A3B_full base_model=/path world_size=16 ep=8
    tune run moe_sharding_plan --config qwen3_moe/30B_A3B_full '~base_model' \\
      model=moe_builders.families.qwen3_moe.qwen3_moe_30b_a3b world_size=1024 ep=64 dp_replicate=4

Arithmetic from the configuration of a training run: the same keys, and those of ``PlanConfig``.
Of a base model only config.json is read. docs/scaling.md says what the numbers mean.
"""

import re
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moe_builders.base_model import check_fits, check_one_decides
from moe_builders.errors import InputError
from moe_builders.experts.backends import set_backend
from moe_builders.flops import count_parameters
from moe_builders.hf_source import find_family, read_hf_config
from moe_builders.instantiate import instantiate
from moe_builders.parallel.launch import launch
from moe_builders.parallel.plan import MeshShape
from moe_builders.parallel.traffic import Collective
from moe_builders.parallel.world import mesh_shape
from moe_builders.router_control import control_routers, replace_routers
from moe_builders.step_plan import Memory, StepPlan, StepSettings, plan_step
from moe_builders.training.config import DTYPES, RecipeConfig, parse_command_line
from moe_builders.training.param_groups import freeze
from moe_builders.training.schema import above, at_least

GB = 1e9


@dataclass
class PlanConfig(RecipeConfig):
    """A training run's configuration, and what a launcher would have told."""

    world_size: int = at_least(1, default=8)  # processes
    node_size: int = at_least(1, default=8)  # of them in a node
    device_memory: float = above(0, default=80.0)  # GB (1e9 bytes) of one device
    # of the optimizer per parameter; null: a known one's
    state_bytes: float | None = at_least(0, default=None)


def build_model(config: PlanConfig) -> Any:  # differs: never a weight, no processes
    """The decoder on the meta device, with the config's routers, frozen as it says."""
    check_one_decides(config.base_model, config.model)
    with torch.device("meta"):
        if config.model is not None:
            model = instantiate(config.model, path="model")
        elif config.base_model is not None:
            source = read_hf_config(config.base_model)
            model = find_family(source, config.base_model).build(source)
        else:
            raise InputError(
                "there is no model: set base_model to a Hugging Face folder, or model to a "
                "component"
            )
        if config.router is not None:
            replace_routers(model, config.router)
    check_fits(model, max_seq_len=config.max_seq_len)
    freeze(model, config.freeze, freeze_router=config.freeze_router)
    control_routers(model, asdict(config.routing), asdict(config.expert_bias))
    set_backend(model, recompute_up=config.recompute_up)
    model.linear_cross_entropy = config.linear_cross_entropy
    return model


def is_packed(dataset: Any) -> bool:
    """Whether rows may hold several documents."""
    return any(each.get("packed", False) for each in
               (dataset if isinstance(dataset, list) else [dataset]))  # fmt: skip


def settings_of(config: PlanConfig) -> StepSettings:
    """What the plan depends on."""
    mesh = mesh_shape(config.world_size, dp_replicate=config.dp_replicate,
                      dp_shard=config.dp_shard, ep=config.ep)  # fmt: skip
    losses = config.router_losses
    counted = losses.load_balancing_scope == "global"
    accumulation = config.gradient_accumulation_steps
    return StepSettings(
        mesh=mesh,
        param_dtype=DTYPES[config.param_dtype],
        compute_dtype=DTYPES[config.compute_dtype],
        optimizer=config.optimizer,
        state_bytes=config.state_bytes,
        batch_size=config.batch_size,
        seq_len=config.max_seq_len,
        packed=is_packed(config.dataset),
        accumulation=accumulation,
        reshard_after_forward=config.reshard_after_forward,
        checkpointing=config.enable_activation_checkpointing,
        ac_mode=config.ac_mode,
        in_backward=config.optimizer_in_bwd,
        offload_optimizer=config.offload_optimizer,
        dispatcher=config.ep_dispatcher,
        global_counts=(1 if losses.global_exact else accumulation) if counted else 0,
        counts_first=losses.global_exact,
    )


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines whose columns stand below each other."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
             for row in [header, *rows]]  # fmt: skip
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def places(plan: StepPlan) -> list[str]:
    """Where each parameter lives, a line for those of all layers that are alike."""
    last = plan.settings.mesh.size - 1
    alike: dict[tuple, list[str]] = {}
    for each in plan.held:
        name = re.sub(r"^layers\.\d+", "layers.*", each.name)
        row = (
            name, str(list(each.parameter.shape)), each.place.kind, each.axes,
            str(list(each.local_shape(0))), str(list(each.local_shape(last))),
            str(each.dtype).removeprefix("torch."), f"{each.numel * each.dtype.itemsize:,}",
            "yes" if each.parameter.trains else "no",
        )  # fmt: skip
        alike.setdefault(row, []).append(each.name)
    header = ("parameter", "shape", "group", "dim: over", "on process 0", f"on process {last}",
              "dtype", "bytes each", "trains", "times")  # fmt: skip
    return table(header, [(*row, str(len(names))) for row, names in alike.items()])


def memory_lines(memory: Memory, *, device_gb: float) -> list[str]:
    """Bytes of the process that holds most."""
    work = memory.activations
    parts = {
        "parameters": memory.parameters, "gradients": memory.gradients,
        "optimizer states": memory.states, "(states on the host)": memory.host_states,
        "gathered weights": memory.gathered, "a layer's gradients, whole": memory.reducing,
        "embedding's and output's": memory.root_gradient,
        "the same, added up": memory.root_reducing,
        "activations kept": work.kept, "a layer's, recomputed": work.recomputed,
        "logits and their gradients": work.logits, "rows that move to experts": work.moving,
        "held": memory.held, "peak": memory.peak,
    }  # fmt: skip
    rows = [(name, f"{value / GB:.2f}") for name, value in parts.items() if value]
    fits = "fits" if memory.peak <= 0.92 * device_gb * GB else "does not fit"
    note = (f"{fits} into {device_gb:g} GB, of which 8 % are left to context, buffers of the "
            "collectives and fragmentation")  # fmt: skip
    return [*table(("memory of a process", "GB"), rows), note]


def traffic_lines(collectives: list[Collective], mesh: MeshShape, *, node_size: int) -> list[str]:
    """Collectives of a step, and the bytes a process sends."""
    rows = []
    for each in collectives:
        inside = each.sent_inside(mesh, node_size=node_size)
        outside = each.sent_outside(mesh, node_size=node_size)
        rows.append((each.why, each.what, f"{each.axis} {each.processes}", str(each.calls),
                     f"{inside / GB:.4f}", f"{outside / GB:.4f}"))  # fmt: skip
    inside, outside = (sum(float(row[i]) for row in rows) for i in (4, 5))
    rows.append(("all", "", "", str(sum(each.calls for each in collectives)), f"{inside:.4f}",
                 f"{outside:.4f}"))  # fmt: skip
    header = ("collectives of a step", "kind", "over", "calls", "GB sent inside the node",
              "GB sent outside")  # fmt: skip
    return table(header, rows)


def text_of(plan: StepPlan, model: Any, config: PlanConfig) -> str:
    """All of it."""
    s, counted = plan.settings, count_parameters(model)
    tokens = s.mesh.size * s.accumulation * s.num_tokens
    head = (
        f"{counted.total:,} parameters ({counted.active:,} active) on {s.mesh.size} processes: "
        f"dp_replicate {s.mesh.dp_replicate}, dp_shard {s.mesh.dp_shard}, ep {s.mesh.ep}; "
        f"{tokens:,} tokens a step, {plan.step_flops / 1e12:.1f} TFLOP each process"
    )
    return "\n".join([
        head, "", *places(plan), "",
        *memory_lines(plan.memory, device_gb=config.device_memory), "",
        *traffic_lines(plan.collectives, s.mesh, node_size=config.node_size), "",
    ])  # fmt: skip


def main(config: PlanConfig) -> str:  # differs: it plans, and trains nothing
    """Plan, and write it to the terminal."""
    model = build_model(config)
    text = text_of(plan_step(model, settings_of(config)), model, config)
    sys.stdout.write(text)
    return text


if __name__ == "__main__":
    sys.exit(launch(main, lambda: parse_command_line(schema=PlanConfig)))
