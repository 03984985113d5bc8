"""Full fine-tuning of a mixture-of-experts model, on one process or many.

    tune run moe_full_finetune --config qwen3_moe/30B_A3B_full base_model=/path batch_size=2
    tune run --nproc_per_node 8 moe_full_finetune --config ...

One file, read from top to bottom: ``main`` at the end calls what stands above it. To change how
training works, copy this file (any other name), edit it, and launch the copy: ``tune run mine``.

Sizes: b rows · s positions · t = b·s tokens of a micro-batch · l layers with experts · e experts.
"""

import sys
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from moe_builders.base_model import BaseModel, check_fits, check_paths, open_base_model
from moe_builders.checkpoint.keeper import Kept, RunKeeper, find_checkpoint
from moe_builders.checkpoint.run_checkpoints import RunCheckpoints
from moe_builders.checkpoint.training_state import TrainingState
from moe_builders.data import build as data
from moe_builders.data.batch import Batch
from moe_builders.data.loader import Batching, StepLoader, total_steps
from moe_builders.data.tokenizer import HFTokenizer, load_tokenizer
from moe_builders.experts.backends import set_backend
from moe_builders.flops import Utilisation, mfu_of_step, utilisation
from moe_builders.losses import IGNORE_INDEX
from moe_builders.moe import collect_routing, moe_layer_names
from moe_builders.ops.output_loss import check_way
from moe_builders.parallel.grad_norm import GradNorm, clip_gradients
from moe_builders.parallel.launch import launch
from moe_builders.parallel.own_time import OwnTime
from moe_builders.parallel.plan import describe_mesh
from moe_builders.parallel.sharding import needs_sharding, shard_model, widen_router_inputs
from moe_builders.parallel.shared_folder import check_shared_folder
from moe_builders.parallel.world import World, open_world
from moe_builders.router_control import (
    control_routers,
    find_router,
    tally_routers,
    teach_routers,
)
from moe_builders.routing import Routing
from moe_builders.summary import describe_experts, describe_routing
from moe_builders.training.compiling import compile_layers
from moe_builders.training.config import DTYPES, RecipeConfig, parse_command_line
from moe_builders.training.finite_watch import FiniteWatch, Watched, watch_output
from moe_builders.training.loggers import build_loggers
from moe_builders.training.low_bit import describe_unquantized
from moe_builders.training.objective import (
    check_balancing,
    layer_counts,
    layer_loads,
    narrow_to,
    router_losses,
)
from moe_builders.training.offloading import activation_offloading, require_gpu
from moe_builders.training.optimizer import (
    build_optimizer,
    build_scheduler,
    describe_schedule,
)
from moe_builders.training.param_groups import freeze, learning_rates
from moe_builders.training.plots import Plots
from moe_builders.training.profiling import StepProfiler
from moe_builders.training.reporting import Reporter, peak_memory
from moe_builders.training.rng import begin_own_stream, rewound_noise
from moe_builders.training.run_files import start_run_folder
from moe_builders.training.stepping import Stepper, build_stepper
from moe_builders.training.stopping import catch_stop_signals, due, should_stop_early


@dataclass(frozen=True)
class Trained:
    """What ``main`` gives back: values of every step, validations, and where the model went."""

    history: list[dict[str, float]]
    validations: list[dict[str, float]]
    model_folder: Path | None  # none: a signal ended the run, which can go on from its checkpoint
    exit_code: int = 0


def build_model(config: RecipeConfig, world: World, *, weights: bool = True) -> BaseModel:
    """The model, sharded, and how to write it back; unfilled if a checkpoint gives the weights."""
    base = open_base_model(
        config.base_model,
        config.model,
        dtype=DTYPES[config.param_dtype],
        device=world.device,
        seed=config.seed,
        init_std=config.init_std,
        router=config.router,
    )
    check_fits(base.model, max_seq_len=config.max_seq_len)
    freeze(base.model, config.freeze, freeze_router=config.freeze_router)
    control_routers(base.model, asdict(config.routing), asdict(config.expert_bias))
    compute_dtype = DTYPES[config.compute_dtype]
    set_backend(
        base.model, backend=config.expert_backend, recompute_up=config.recompute_up,
        device=world.device, dtype=compute_dtype,
    )  # fmt: skip
    check_balancing(base.model, load_balancing_coef=config.router_losses.load_balancing_coef)
    base.model.activation_checkpointing = config.enable_activation_checkpointing
    base.model.ac_mode = config.ac_mode
    base.model.kept_activations = activation_offloading(config.enable_activation_offloading)
    base.model.linear_cross_entropy = check_way(config.linear_cross_entropy, world.device)
    if config.compile:
        compile_layers(base.model.layers)
    if needs_sharding(base.model, world, compute_dtype=compute_dtype):
        shard_model(
            base.model,
            world,
            compute_dtype=compute_dtype,
            reshard_after_forward=config.reshard_after_forward,
            dispatcher=config.ep_dispatcher,
        )
    else:
        widen_router_inputs(base.model)
    base.fill(world.device, weights=weights, show=world.is_first)
    return base


def build_loader(
    config: RecipeConfig, world: World, tokenizer: HFTokenizer, *, validation: bool
) -> StepLoader:
    """Training steps, or all of the validation set in order."""
    batching = Batching(
        batch_size=config.batch_size,
        accumulation=config.gradient_accumulation_steps,
        rank=world.rank,
        size=world.size,
        pad_id=tokenizer.pad_id,
        max_seq_len=config.max_seq_len,
        pad_to_multiple_of=config.pad_to_multiple_of,
        num_workers=config.num_workers,
        prefetch_factor=config.prefetch_factor,
        pin_memory=world.device.type == "cuda",
    )
    return data.build_loader(
        config.dataset_val if validation else config.dataset,
        tokenizer,
        batching,
        seed=config.seed,
        shuffle=config.shuffle,
        long_samples=config.long_samples,
        shuffle_window=config.shuffle_window,
        path="dataset_val" if validation else "dataset",
        validation=validation,
        show=world.is_first,
    )


def step_totals(step: list[Batch], world: World, *, stop: bool) -> dict[str, Tensor]:
    """Sums over the step and all processes: labelled and real tokens (at least 1 each), attended
    pairs, cut samples, and how many processes are asked to stop."""
    own = [(b.num_labels, b.num_real, b.attended_pairs, b.num_cut) for b in step]
    sums = torch.tensor([*map(sum, zip(*own, strict=True)), stop])
    labels, real, pairs, cut, stops = world.sum(world.send(sums))
    tokens = {"labels": labels.clamp(min=1), "tokens": real.clamp(min=1), "pairs": pairs}
    return tokens | {"cut_samples": cut, "stop": stops}


def forward(
    model: nn.Module, batch: Batch, *, divisor: Tensor | None = None, counts_only: bool = False
) -> Tensor:
    """Cross-entropy [nats] summed over the labelled tokens of a micro-batch, by the divisor.

    counts_only: only the routers' choices are of interest, and the output is left out.
    """
    return model(
        batch.tokens, mask=batch.attention_for(model), input_pos=batch.positions, info=batch.info,
        labels=batch.labels, divisor=divisor, skip_output_layer=counts_only,
    )  # fmt: skip


def step_counts(model: nn.Module, step: list[Batch], config: RecipeConfig, world: World) -> Tensor:
    """[l, e] assignments of the whole step, from one more forward without gradients."""
    total = torch.zeros((), dtype=torch.int64, device=world.device)
    with torch.no_grad(), rewound_noise(world.device):
        for batch in step:
            forward(model, batch, counts_only=True)
            total = total + layer_counts(loss_routings(model, batch, config))
    return world.sum(total)


def loss_routings(model: nn.Module, batch: Batch, config: RecipeConfig) -> dict[str, Routing]:
    """The last forward's routings, as the tokens that count for router losses see them."""
    routings = collect_routing(model)
    if config.router_losses.mask == "labels":
        return narrow_to(routings, batch.labels.flatten() != IGNORE_INDEX)
    return routings


def train_step(
    model: nn.Module, step: list[Batch], config: RecipeConfig, world: World, *, stop: bool = False
) -> dict[str, Tensor]:
    """Forward and backward of every micro-batch; gradients are those of the whole step's mean.

    Args:
        stop: whether this process is asked to stop; the others learn of it here.

    Returns:
        Values of the step over all processes, as tensors: nothing here waits for the device.
    """
    losses = config.router_losses
    totals = step_totals(step, world, stop=stop)
    num_labels = totals.pop("labels")
    num_tokens = num_labels if losses.mask == "labels" else totals["tokens"]
    step = [batch.to(world.device) for batch in step]
    seen = step_counts(model, step, config, world) if losses.global_exact else None
    sums = torch.zeros(4, device=world.device, dtype=torch.float64)  # lm, balance, z, own
    load, tally = sums.new_zeros(()), sums.new_zeros(())
    for batch in step:
        lm = forward(model, batch, divisor=num_labels)
        routings = loss_routings(model, batch, config)
        load = load + layer_loads(routings)  # [3, l, e]: assigned, kept, scores
        tally = tally + tally_routers(model)
        scope_counts = None
        if losses.load_balancing_scope == "global":
            scope_counts = seen if losses.global_exact else world.sum(load[0].clone())
        router = router_losses(
            routings,
            form=losses.load_balancing_form,
            on=losses.load_balancing_on,
            scope=losses.load_balancing_scope,
            num_tokens=num_tokens,
            counts=scope_counts,
        )
        loss = (
            lm + losses.load_balancing_coef * router["balance"]
            + losses.z_coef * router["z"] + losses.own_coef * router["own"]
        )  # fmt: skip
        watch_output(model, loss)
        loss.backward()  # gradients are added up over processes: this is one's part of the mean
        parts = lm, router["balance"], router["z"], router["own"]
        sums += torch.stack(parts).detach()
    sums, load, tally = world.sum(sums), world.sum(load), world.sum(tally)
    shown = {"loss": sums[0], "balance": sums[1], "z": sums[2], "own": sums[3]}
    return {**shown, "load": load, "tally": tally, **totals}


def update(stepper: Stepper, scheduler: LRScheduler | None, config: RecipeConfig) -> Tensor:
    """Clip, step, schedule; returns the gradients' norm before clipping."""
    norm = stepper.norm()
    if config.clip_grad_norm is not None:
        clip_gradients(stepper.parameters, norm, config.clip_grad_norm)
    stepper.step()
    if scheduler is not None:
        scheduler.step()
    return norm


@torch.no_grad()
def validate(model: nn.Module, loader: StepLoader, world: World) -> tuple[dict[str, float], Tensor]:
    """Mean cross-entropy [nats per labelled token] and loads [3, l, e] on the validation set."""
    model.eval()
    total = torch.zeros(2, device=world.device, dtype=torch.float64)  # nats, labelled tokens
    load = total.new_zeros(())
    for batch in loader:
        batch = batch.to(world.device)
        total[0] += forward(model, batch)
        total[1] += (batch.labels != IGNORE_INDEX).sum()
        load = load + layer_loads(collect_routing(model))  # [3, l, e]
    model.train()
    nats, tokens = world.sum(total).tolist()
    return {"val_loss": nats / max(tokens, 1)}, world.sum(load)


def run(config: RecipeConfig, world: World) -> Trained:
    """Prepare everything, train, validate, save."""
    output = Path(config.output_dir)
    check_paths(output, base_model=config.base_model)
    check_shared_folder(output, world)
    find_router(config.router)
    plots = Plots(output / "plots") if config.plots else None
    require_gpu(
        world.device,
        offload_optimizer=config.offload_optimizer,
        enable_activation_offloading=config.enable_activation_offloading,
    )
    torch.manual_seed(config.seed)
    tokenizer = load_tokenizer(config.tokenizer, config.base_model)
    loader = build_loader(config, world, tokenizer, validation=False)
    val_loader = None
    if config.dataset_val is not None:
        val_loader = build_loader(config, world, tokenizer, validation=True)
    lengths = {"epochs": config.epochs, "max_steps": config.max_steps}
    total_steps(loader, **lengths)  # a mistake here is said before the model is loaded
    checkpoints = RunCheckpoints(
        output / "checkpoints", world=world, keep_last=config.keep_last,
        background=config.enable_async_checkpointing,
    )  # fmt: skip
    start = find_checkpoint(config.resume, checkpoints)
    base = build_model(config, world, weights=start.checkpoint is None)
    model = base.model
    begin_own_stream(config.seed, world.rank)
    # a tokenizer of one's own need not tell
    check_fits(model, vocab_size=getattr(tokenizer, "vocab_size", None))
    optimizer = build_optimizer(config.optimizer, model, param_groups=config.param_groups)
    stepper = build_stepper(
        optimizer, GradNorm(), world.device,
        in_backward=config.optimizer_in_bwd, offload=config.offload_optimizer,
    )  # fmt: skip
    keeper = RunKeeper(
        checkpoints=checkpoints, state=TrainingState(model, stepper), loader=loader,
        settings=asdict(config), source=base.source_json, world=world,
    )  # fmt: skip
    kept = keeper.restore(start)
    num_steps = total_steps(loader, **lengths, done=kept.step)
    scheduler = build_scheduler(config.lr_scheduler, optimizer, num_steps=num_steps, done=kept.step)
    own_time = OwnTime(world, optimizer)
    watch = model.probe = FiniteWatch(num_layers=len(model.layers))
    profiler = StepProfiler(
        output / "profile", rank=world.rank, num_steps=num_steps, **asdict(config.profiler)
    )
    used = utilisation(
        model, peak_tflops=config.peak_tflops, compute_dtype=DTYPES[config.compute_dtype],
        device=world.device, num_devices=world.size,
    )  # fmt: skip
    reporter = open_reporter(config, world, moe_layer_names(model), kept, plots, total=num_steps)

    def validation_at(step: int) -> None:
        if val_loader is not None and not reporter.has_validated(step):
            reporter.validated(step, *validate(model, val_loader, world))

    def stop_early() -> bool:
        losses = [v["val_loss"] for v in reporter.validations]
        return reporter.has_validated(number) and should_stop_early(
            losses, patience=config.early_stop_patience, min_delta=config.early_stop_min_delta
        )

    def save_at(step: int) -> None:
        reporter.flush()  # a loss that is not finite stops here, before it is saved
        reporter.say(*keeper.save(step, reporter.shown()))

    number = kept.step
    # closed also when a step fails: the bar must not swallow the message
    with profiler, closing(reporter), catch_stop_signals() as request, checkpoints:
        reporter.say(
            *describe_mesh(world.shape, dispatcher=config.ep_dispatcher),
            *kept.notes, *loader.notes, *base.notes, *describe_routing(model),
            *describe_experts(model, device=world.device, dtype=DTYPES[config.compute_dtype]),
            *describe_unquantized(optimizer, model),
            *describe_schedule(config.lr_scheduler, num_steps=num_steps),
        )  # fmt: skip
        if number == 0 or due(number, config.run_val_every_n_steps):
            validation_at(number)
        early, stopped = stop_early(), False
        left = 0 if early else num_steps - kept.step
        steps = islice(loader.steps(epochs=config.epochs), left)
        started = time.perf_counter()
        for number, step in enumerate(steps, start=kept.step + 1):
            world.doing(f"step {number}")
            own_time.loaded(time.perf_counter() - started)
            values: dict[str, Any] = {**train_step(model, step, config, world, stop=request.asked)}
            values |= learning_rates(optimizer)
            watched = watch.take(model.named_parameters())
            values["grad_norm"] = update(stepper, scheduler, config)
            values |= own_time.take()
            teach_routers(model, values.pop("tally"))  # biases and thresholds: once a step
            report(reporter, number, values, watched, time.perf_counter() - started, used, world)
            profiler.step()  # may write for seconds: no part of a step's time
            # a process that is alone need not wait until all have heard of it
            alone = request.asked and world.size == 1
            stopped = (reporter.asked_to_stop or alone) and number < num_steps
            if due(number, config.run_val_every_n_steps) and not stopped:
                validation_at(number)
                early = stop_early()
            if stopped or early:
                break
            if due(number, config.checkpoint_every_n_steps) and number < num_steps:
                save_at(number)
            started = time.perf_counter()
        if stopped:
            save_at(number)
            reporter.say(*keeper.finish())
            reporter.say(f"stopped by {request.name} at step {number} of {num_steps}: the same "
                         "command with resume=auto (the default) goes on from here")  # fmt: skip
            return Trained(reporter.history, reporter.validations, None, request.exit_code)
        reporter.flush()  # a loss that is not finite stops here, before anything is saved
        if early:
            best = min(reporter.validations, key=lambda v: v["val_loss"])
            reporter.say(f"stopped early at step {number}: the best validation loss was "
                         f"{best['val_loss']:.4f} at step {best['step']}")  # fmt: skip
        validation_at(number)  # a stream may have ended before max_steps
        if config.checkpoint_every_n_steps is not None:
            save_at(number)
        reporter.say(*keeper.finish())
        folder = output / "model"
        base.save(folder, rank=world.rank, size=world.size)
        world.barrier()
        reporter.say(f"saved {folder}")
    return Trained(reporter.history, reporter.validations, folder)


def open_reporter(
    config: RecipeConfig, world: World, layers: list[str], kept: Kept, plots: Plots | None,
    *, total: int,
) -> Reporter:  # fmt: skip
    """What shows the run; on the first process it also fills the run's folder."""
    output = Path(config.output_dir)
    loggers, metrics = [], None
    if world.is_first:
        loggers = build_loggers(config.metric_logger, output_dir=config.output_dir)
        metrics = start_run_folder(
            output, device=world.device, num_processes=world.size, step=kept.step
        )
        settings = OmegaConf.structured(config)
        OmegaConf.save(settings, output / "torchtune_config.yaml")
        for logger in loggers:
            logger.log_config(settings)
    return Reporter(
        loggers, total=total, every=config.log_every_n_steps, show=world.is_first,
        layers=layers, log_layers=config.log_layers, log_experts=config.log_experts,
        metrics=metrics, pictures=plots if world.is_first else None,
        gather=world.gather_objects, **kept.shown,
    )  # fmt: skip


def report(
    reporter: Reporter, number: int, values: dict[str, Any], watched: Watched, seconds: float,
    used: Utilisation | None, world: World,
) -> None:  # fmt: skip
    """Hand a step's values to the reporter; they are read when the next step has been launched."""
    load, tokens, pairs = (values.pop(name) for name in ("load", "tokens", "pairs"))
    values["tokens_per_second"] = tokens / seconds
    values |= mfu_of_step(used, num_tokens=tokens, attended=pairs, seconds=seconds)
    reporter.step(number, values | peak_memory(world.device), load=load, watched=watched)


def main(config: RecipeConfig) -> Trained:
    """Train as the configuration says; on every process of the launch."""
    with open_world(
        device=config.device, dp_replicate=config.dp_replicate, dp_shard=config.dp_shard,
        ep=config.ep, timeout_minutes=config.timeout_minutes, deterministic=config.deterministic,
        settings=asdict(config),
    ) as world:  # fmt: skip
        return run(config, world)


if __name__ == "__main__":
    sys.exit(launch(main, parse_command_line))
