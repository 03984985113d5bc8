"""What a run holds, sends and computes on any number of processes, before any of them is started.

Letters: b rows · s positions · t = b·s tokens of a process's micro-batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_builders.activations import Activations, count_activations
from moe_builders.errors import InputError
from moe_builders.flops import ModelFlops, experts_per_token, model_flops
from moe_builders.moe import moe_layers
from moe_builders.parallel.holdings import Gathered, Held, Parameter, gather_groups, hold
from moe_builders.parallel.plan import MeshShape, check_expert_parallel, sharding_plan
from moe_builders.parallel.sharding import group_modules
from moe_builders.parallel.traffic import (
    Collective,
    ExpertLayer,
    expert_traffic,
    fsdp_traffic,
    small_traffic,
)
from moe_builders.training.param_groups import is_small
from moe_builders.training.state_size import state_bytes


@dataclass(frozen=True)
class StepSettings:
    """What of a run's configuration the plan depends on; names as in ``RecipeConfig``.

    Attributes:
        mesh: the processes.
        param_dtype: of storage.
        compute_dtype: of forward and backward.
        optimizer: the config's component.
        state_bytes: what it keeps per parameter; None: known from its name.
        batch_size: b.
        seq_len: s.
        packed: documents share rows.
        accumulation: micro-batches of a step.
        reshard_after_forward, checkpointing, in_backward, offload_optimizer: switches.
        dispatcher: "all_to_all" or "all_gather".
        global_counts: how often a step counts assignments over all processes for its loss.
        counts_first: each micro-batch has a forward without gradients before, that counts.
    """

    mesh: MeshShape
    param_dtype: torch.dtype = torch.float32
    compute_dtype: torch.dtype = torch.bfloat16
    optimizer: Mapping[str, Any] | None = None
    state_bytes: float | None = None
    batch_size: int = 1
    seq_len: int = 4096
    packed: bool = False
    accumulation: int = 1
    reshard_after_forward: bool = True
    checkpointing: bool = True
    in_backward: bool = False
    offload_optimizer: bool = False
    dispatcher: str = "all_to_all"
    global_counts: int = 0
    counts_first: bool = False

    @property
    def num_tokens(self) -> int:
        """t."""
        return self.batch_size * self.seq_len


@dataclass(frozen=True)
class Memory:
    """Bytes of the process that holds most; activations are those of equally loaded experts.

    Attributes:
        parameters, gradients, states: for as long as the run lasts (gradients: while a step does).
        host_states: states that lie on the host instead.
        gathered: the layer at work and the next one, whole, and what stays gathered.
        root_gradient: of embedding and output, whole: they wait for each other through backward.
        reducing: a layer's largest group's gradient, whole, as computed and as it is added up.
        root_reducing: of embedding and output, as they are added up at the end.
        activations: see there.
    """

    parameters: int
    gradients: int
    states: int
    host_states: int
    gathered: int
    root_gradient: int
    reducing: int
    root_reducing: int
    activations: Activations

    @property
    def held(self) -> int:
        """Parameters, gradients and states."""
        return self.parameters + self.gradients + self.states

    @property
    def peak(self) -> int:
        """The worst of three moments: the loss's backward, the first layer's after it, the end."""
        work = self.activations
        layer = work.kept + self.root_gradient + self.reducing + work.recomputed + work.moving
        end = self.root_gradient + self.root_reducing
        return self.held + self.gathered + max(work.kept + work.logits, layer, end)


@dataclass(frozen=True)
class StepPlan:
    """A run on a mesh.

    Attributes:
        settings: what it was made for.
        held: every parameter.
        memory: of a process.
        collectives: of a step, of each process.
        flops: of the model.
    """

    settings: StepSettings
    held: list[Held]
    memory: Memory
    collectives: list[Collective]
    flops: ModelFlops

    @property
    def step_flops(self) -> float:
        """FLOPs that a process computes in a step, what it recomputes among them."""
        s = self.settings
        pairs = s.batch_size * s.seq_len * (s.seq_len + 1) / 2
        passes = 3 + s.checkpointing + s.counts_first
        forward = self.flops.forward(num_tokens=s.num_tokens, attended=pairs)
        return s.accumulation * passes * forward


def plan_step(model: Any, settings: StepSettings) -> StepPlan:
    """The plan of a model.

    Args:
        model: a decoder, not sharded; on the meta device or real.
        settings: of the run.

    Raises:
        InputError: experts that ep does not divide, or parts that the plan does not know.
    """
    mesh, layers = settings.mesh, _expert_layers(model, settings)
    for (name, _), layer in zip(moe_layers(model), layers, strict=True):
        check_expert_parallel(ep=mesh.ep, num_experts=layer.num_experts, layer=f"{name}.experts")
    parameters = {
        name: Parameter(tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()
    }
    modules = sharding_plan(group_modules(model))
    held = hold(parameters, modules, mesh, param_dtype=settings.param_dtype)
    groups = gather_groups(held, compute_dtype=settings.compute_dtype, world_size=mesh.size)
    collectives = [
        *fsdp_traffic(
            groups, mesh, reshard_after_forward=settings.reshard_after_forward,
            accumulation=settings.accumulation, counts_first=settings.counts_first,
        ),
        *expert_traffic(
            layers, mesh, dispatcher=settings.dispatcher, num_tokens=settings.num_tokens,
            compute_dtype=settings.compute_dtype, accumulation=settings.accumulation,
            forwards=1 + settings.checkpointing + settings.counts_first,
            answered=1 + settings.counts_first,
        ),
        *small_traffic(
            layers, mesh, global_counts=settings.global_counts,
            tally_size=sum(getattr(moe.router, "tally_size", 0) for _, moe in moe_layers(model)),
            experts_apart=mesh.ep > 1 and bool(layers), dense_shards=mesh.shards("layer"),
        ),
    ]  # fmt: skip
    activations = count_activations(
        model,
        num_tokens=settings.num_tokens,
        mask_len=settings.seq_len if settings.packed else 0,
        compute_dtype=settings.compute_dtype,
        checkpointing=settings.checkpointing,
        ep=mesh.ep,
        dispatcher=settings.dispatcher,
    )
    memory = _memory(model, held, groups, activations, settings)
    return StepPlan(settings, held, memory, collectives, model_flops(model))


def _expert_layers(model: nn.Module, settings: StepSettings) -> list[ExpertLayer]:
    found = []
    for name, moe in moe_layers(model):
        experts: Any = moe.experts
        if not hasattr(experts, "dim"):
            raise InputError(
                f"the experts of {name} ({type(experts).__name__}) do not tell their size: give "
                "them an attribute dim"
            )
        k = experts_per_token(moe.router)
        fixed = hasattr(moe.router, "experts_per_token")
        found.append(
            ExpertLayer(
                moe.router.num_experts,
                round(settings.num_tokens * k),
                experts.dim,
                slots=int(k) if fixed else None,
                mid_weights=moe.score_position == "mid",
                output_weights=moe.score_position == "after",
            )
        )
    return found


def _memory(
    model: nn.Module, held: list[Held], groups: list[Gathered], activations: Activations,
    settings: StepSettings,
) -> Memory:  # fmt: skip
    weights = dict(model.named_parameters())
    trained = [each for each in held if each.parameter.trains]
    gradients = {each.name: each.numel * each.dtype.itemsize for each in trained}
    states = 0.0
    for each in trained:
        per_number = settings.state_bytes
        if per_number is None:
            small = is_small(each.name, weights[each.name])
            item = each.dtype.itemsize
            per_number = state_bytes(settings.optimizer, each.numels(), small=small, item=item)
        states += each.numel * per_number
    kept = sum(gradients.values())
    if settings.in_backward:  # a group's are freed before the next one's come
        kept = max(
            (sum(gradients[h.name] for h in trained if h.place.group == group.module)
             for group in groups), default=0,
        )  # fmt: skip
    offloaded = settings.offload_optimizer
    root = [group for group in groups if group.kind == "root"]
    return Memory(
        parameters=sum(each.numel * each.dtype.itemsize for each in held),
        gradients=kept,
        states=0 if offloaded else round(states),
        host_states=round(states) if offloaded else 0,
        gathered=_gathered(groups, reshard=settings.reshard_after_forward),
        root_gradient=sum(g.gradient_bytes for g in root),
        reducing=max(
            (g.gradient_bytes + g.reduced_bytes for g in groups if g not in root), default=0
        ),
        root_reducing=sum(g.reduced_bytes for g in root),
        activations=activations,
    )


def _gathered(groups: list[Gathered], *, reshard: bool) -> int:
    """What stays gathered, the layer at work, and what is on its way: the next one, or a copy.

    FSDP2 gathers into one buffer and copies the weights out of it; going forward it keeps the
    buffer until the next group has come. A group of one process is copied when it is used.
    """
    stays = sum(g.weight_bytes for g in groups if not reshard or g.kind in ("root", "router"))
    layers: dict[str, list[Gathered]] = {}
    for group in groups:
        if group.kind in ("layer", "experts"):
            layers.setdefault(".".join(group.module.split(".")[:2]), []).append(group)
    most = 0
    for own, following in zip(layers.values(), [*list(layers.values())[1:], []], strict=True):
        sent, sent_next = (
            [g.weight_bytes for g in each if g.shards > 1] for each in (own, following)
        )
        buffer = max(sent, default=0)
        if reshard:
            at_work = sum(g.weight_bytes for g in own)
            most = max(most, at_work + max(buffer, sum(sent_next)))
        else:
            most = max(most, buffer)
    return stays + most
