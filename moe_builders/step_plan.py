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
from moe_builders.flops import (
    ModelFlops,
    experts_per_token,
    flops_without_experts,
    model_flops,
)
from moe_builders.moe import moe_layers
from moe_builders.ops.document_kernels import takes_heads
from moe_builders.parallel.holdings import (
    Gathered,
    Held,
    Parameter,
    gather_groups,
    hold,
    most_gathered,
    staying,
)
from moe_builders.parallel.plan import MeshShape, check_expert_parallel, sharding_plan
from moe_builders.parallel.sharding import group_modules, sharding_changes
from moe_builders.parallel.traffic import (
    Collective,
    ExpertLayer,
    expert_traffic,
    fsdp_traffic,
    small_traffic,
)
from moe_builders.step_memory import Memory
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
        ac_mode: what is recomputed, "full" or "selective".
        dispatcher: "all_to_all" or "all_gather".
        global_counts: how often a step counts assignments over all processes for its loss.
        counts_first: each micro-batch has a forward without gradients before, that counts.
        fused_norms: False: norms as a CPU computes them, which keep more.
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
    ac_mode: str = "full"
    in_backward: bool = False
    offload_optimizer: bool = False
    dispatcher: str = "all_to_all"
    global_counts: int = 0
    counts_first: bool = False
    fused_norms: bool = True

    @property
    def recomputes_experts(self) -> bool:
        """Whether experts compute a second forward."""
        return self.checkpointing and self.ac_mode == "full"

    @property
    def num_tokens(self) -> int:
        """t."""
        return self.batch_size * self.seq_len


@dataclass(frozen=True)
class StepPlan:
    """A run on a mesh.

    Attributes:
        settings: what it was made for.
        held: every parameter.
        memory: of a process.
        collectives: of a step, of each process.
        flops: of the model.
        recomputed: of its forward, those that are computed again.
    """

    settings: StepSettings
    held: list[Held]
    memory: Memory
    collectives: list[Collective]
    flops: ModelFlops
    recomputed: ModelFlops

    @property
    def step_flops(self) -> float:
        """FLOPs that a process computes in a step, what it recomputes among them."""
        s = self.settings
        pairs = s.batch_size * s.seq_len * (s.seq_len + 1) / 2
        sizes = {"num_tokens": s.num_tokens, "attended": pairs}
        forward = (3 + s.counts_first) * self.flops.forward(**sizes)
        return s.accumulation * (forward + self.recomputed.forward(**sizes))


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
            forwards=1 + settings.recomputes_experts + settings.counts_first,
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
        mask_len=settings.seq_len if settings.packed and _needs_mask(model, settings) else 0,
        compute_dtype=settings.compute_dtype,
        checkpointing=settings.checkpointing,
        ac_mode=settings.ac_mode,
        ep=mesh.ep,
        dispatcher=settings.dispatcher,
        fused_norms=settings.fused_norms,
    )
    memory = _memory(model, held, groups, activations, settings)
    flops, again = model_flops(model), ModelFlops(0, 0)
    if settings.checkpointing:
        again = flops if settings.recomputes_experts else flops_without_experts(model)
    return StepPlan(settings, held, memory, collectives, flops, again)


def _needs_mask(model: Any, settings: StepSettings) -> bool:
    """Whether an attention is told by a mask, on GPUs, what documents are."""
    return not all(
        getattr(attn, "takes_documents", False)
        and not getattr(attn, "dropout", 0)
        and takes_heads(settings.compute_dtype, max(attn.head_dim, getattr(attn, "v_head_dim", 0)))
        for attn in (layer.attn for layer in model.layers)
    )


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
    size, work = settings.mesh.size, activations
    dtypes = {each.name: each.dtype for each in held}
    sharded = sharding_changes(dtypes, size=size, compute_dtype=settings.compute_dtype)
    inner = [group for group in groups if group.kind != "root"]
    computed = max((g.gradient_bytes for g in inner), default=0)
    reducing = max((g.gradient_bytes + g.reduced_bytes for g in inner), default=0)
    backward = max(work.working, work.rows + computed)
    if sharded:  # one process adds up before it goes on; others while they do
        backward = work.working + reducing if size > 1 else max(backward, reducing)
    root = [group for group in groups if group.kind == "root" and sharded]
    return Memory(
        parameters=sum(each.numel * each.dtype.itemsize for each in held),
        gradients=kept,
        early_gradients=kept if settings.accumulation > 1 else 0,
        late_gradients=kept if sharded else max(0, kept - computed),
        states=0 if offloaded else round(states),
        host_states=round(states) if offloaded else 0,
        gathered=most_gathered(groups, reshard=settings.reshard_after_forward) if sharded else 0,
        stays=staying(groups, reshard=settings.reshard_after_forward) if sharded else 0,
        root_gradient=sum(g.gradient_bytes for g in root),
        reducing=reducing if sharded else 0,
        root_reducing=sum(g.reduced_bytes for g in root),
        layer_backward=backward,
        activations=activations,
    )
