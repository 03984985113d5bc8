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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from moe_builders.base_model import BaseModel, check_fits, check_paths, open_base_model
from moe_builders.data.batch import Batch
from moe_builders.data.datasets import build_dataset
from moe_builders.data.loader import StepSampler, make_loader, training_steps
from moe_builders.data.tokenizer import HFTokenizer, load_tokenizer
from moe_builders.losses import IGNORE_INDEX, cross_entropy_sum
from moe_builders.metrics import dead_experts, load_metrics, max_violation
from moe_builders.moe import collect_routing
from moe_builders.parallel.grad_norm import clip_gradients, global_grad_norm
from moe_builders.parallel.launch import launch
from moe_builders.parallel.sharding import shard_model
from moe_builders.parallel.world import World, open_world
from moe_builders.routing import Routing
from moe_builders.training.compiling import compile_layers
from moe_builders.training.config import DTYPES, RecipeConfig, parse_command_line
from moe_builders.training.objective import layer_counts, narrow_to, router_losses
from moe_builders.training.optimizer import build_optimizer, build_scheduler
from moe_builders.training.reporting import Reporter, build_loggers, peak_memory_gib


@dataclass(frozen=True)
class Trained:
    """What ``main`` gives back: values of every step, validations, and where the model went."""

    history: list[dict[str, float]]
    validations: list[dict[str, float]]
    model_folder: Path


def build_model(config: RecipeConfig, world: World) -> BaseModel:
    """The model, sharded and filled, and how to write it back."""
    base = open_base_model(
        config.base_model,
        config.model,
        dtype=DTYPES[config.param_dtype],
        device=world.device,
        seed=config.seed,
        init_std=config.init_std,
    )
    check_fits(base.model, max_seq_len=config.max_seq_len)
    base.model.activation_checkpointing = config.enable_activation_checkpointing
    if config.compile:
        compile_layers(base.model.layers)
    shard_model(
        base.model,
        world,
        compute_dtype=DTYPES[config.compute_dtype],
        reshard_after_forward=config.reshard_after_forward,
    )
    base.fill(world.device)
    return base


def build_loader(
    config: RecipeConfig, world: World, tokenizer: HFTokenizer, *, validation: bool
) -> tuple[DataLoader[Batch], StepSampler]:
    """Training micro-batches, or all of the validation set in order."""
    path = "dataset_val" if validation else "dataset"
    node = config.dataset_val if validation else config.dataset
    dataset = build_dataset(
        node, tokenizer, max_seq_len=config.max_seq_len, path=path, show=world.is_first
    )
    sampler = StepSampler(
        num_samples=len(dataset),
        batch_size=config.batch_size,
        accumulation=1 if validation else config.gradient_accumulation_steps,
        rank=world.rank,
        size=world.size,
        seed=config.seed,
        shuffle=config.shuffle and not validation,
        keep_last=validation,
    )
    loader = make_loader(
        dataset,
        sampler,
        pad_id=tokenizer.pad_id,
        max_seq_len=config.max_seq_len,
        num_workers=config.num_workers,
        pin_memory=world.device.type == "cuda",
        pad_to_multiple_of=config.pad_to_multiple_of,
    )
    return loader, sampler


def count_tokens(step: list[Batch], world: World) -> tuple[Tensor, Tensor]:
    """(labelled, real) tokens of the whole step over all processes, at least 1 each."""
    own = [sum(batch.num_labels for batch in step), sum(batch.num_real for batch in step)]
    labels, real = world.sum(world.send(torch.tensor(own))).clamp(min=1)
    return labels, real


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """Summed cross-entropy [nats] over the labelled tokens of a micro-batch."""
    logits = model(
        batch.tokens, mask=batch.attention_mask, input_pos=batch.positions, info=batch.info
    )  # [b, s, v]
    return cross_entropy_sum(logits, batch.labels)


def step_counts(model: nn.Module, step: list[Batch], config: RecipeConfig, world: World) -> Tensor:
    """[l, e] assignments of the whole step, from one more forward without gradients."""
    total = None
    with torch.no_grad():
        for batch in step:
            forward(model, batch)
            counts = layer_counts(loss_routings(model, batch, config))
            total = counts if total is None else total + counts
    assert total is not None
    return world.sum(total)


def loss_routings(model: nn.Module, batch: Batch, config: RecipeConfig) -> dict[str, Routing]:
    """The last forward's routings, as the tokens that count for router losses see them."""
    routings = collect_routing(model)
    if config.router_losses.mask == "labels":
        return narrow_to(routings, batch.labels.flatten() != IGNORE_INDEX)
    return routings


def train_step(
    model: nn.Module, step: list[Batch], config: RecipeConfig, world: World
) -> dict[str, Tensor]:
    """Forward and backward of every micro-batch; gradients are those of the whole step's mean.

    Returns:
        Values of the step over all processes, as tensors: nothing here waits for the device.
    """
    losses = config.router_losses
    num_labels, num_real = count_tokens(step, world)
    num_tokens = num_labels if losses.mask == "labels" else num_real
    step = [batch.to(world.device) for batch in step]
    seen = step_counts(model, step, config, world) if losses.global_exact else None
    sums = torch.zeros(3, device=world.device, dtype=torch.float64)  # lm, balance, z
    load = None
    for batch in step:
        lm_sum = forward(model, batch)
        routings = loss_routings(model, batch, config)
        counts = layer_counts(routings)  # [l, e]
        load = counts if load is None else load + counts
        scope_counts = None
        if losses.load_balancing_scope == "global":
            scope_counts = seen if losses.global_exact else world.sum(load.clone())
        balance, z = router_losses(
            routings,
            scope=losses.load_balancing_scope,
            num_tokens=num_tokens,
            counts=scope_counts,
        )
        loss = lm_sum / num_labels + losses.load_balancing_coef * balance + losses.z_coef * z
        (loss * world.size).backward()  # FSDP averages over processes; the mean is already whole
        sums += torch.stack([lm_sum.detach() / num_labels, balance.detach(), z.detach()])
    assert load is not None
    sums, load = world.sum(sums), world.sum(load)
    return {"loss": sums[0], "balance": sums[1], "z": sums[2], "load": load, "tokens": num_real}


def update(
    model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None, config: RecipeConfig
) -> Tensor:
    """Clip, step, schedule; returns the gradients' norm before clipping."""
    parameters = list(model.parameters())
    norm = global_grad_norm(parameters)
    if config.clip_grad_norm is not None:
        clip_gradients(parameters, norm, config.clip_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if scheduler is not None:
        scheduler.step()
    return norm


@torch.no_grad()
def validate(model: nn.Module, loader: DataLoader[Batch], world: World) -> dict[str, float]:
    """Mean cross-entropy [nats per labelled token] and expert load on the validation set."""
    model.eval()
    total = torch.zeros(2, device=world.device, dtype=torch.float64)  # nats, labelled tokens
    load = None
    for batch in loader:
        batch = batch.to(world.device)
        total[0] += forward(model, batch)
        total[1] += (batch.labels != IGNORE_INDEX).sum()
        counts = layer_counts(collect_routing(model))
        load = counts if load is None else load + counts
    model.train()
    assert load is not None
    nats, tokens = world.sum(total).tolist()
    return {"val_loss": nats / max(tokens, 1)} | {
        f"val_{name}": value for name, value in load_metrics(world.sum(load)).items()
    }


def run(config: RecipeConfig, world: World) -> Trained:
    """Prepare everything, train, validate, save."""
    output = Path(config.output_dir)
    check_paths(output, base_model=config.base_model)
    torch.manual_seed(config.seed)
    tokenizer = load_tokenizer(config.tokenizer, config.base_model)
    loader, sampler = build_loader(config, world, tokenizer, validation=False)
    val_loader = None
    if config.dataset_val is not None:
        val_loader, _ = build_loader(config, world, tokenizer, validation=True)
    num_steps = sampler.num_steps * config.epochs
    if config.max_steps is not None:
        num_steps = min(num_steps, config.max_steps)
    base = build_model(config, world)
    model = base.model
    # a tokenizer of one's own need not tell
    check_fits(model, vocab_size=getattr(tokenizer, "vocab_size", None))
    optimizer = build_optimizer(config.optimizer, model)
    scheduler = build_scheduler(config.lr_scheduler, optimizer, num_steps=num_steps)
    loggers = []
    if world.is_first:
        loggers = build_loggers(config.metric_logger, output_dir=config.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        settings = OmegaConf.structured(config)
        OmegaConf.save(settings, output / "torchtune_config.yaml")
        for logger in loggers:
            logger.log_config(settings)
    reporter = Reporter(
        loggers, total=num_steps, every=config.log_every_n_steps, show=world.is_first
    )

    validations: list[dict[str, float]] = []

    def validation_at(step: int) -> None:
        if val_loader is None:
            return
        values = validate(model, val_loader, world)
        validations.append({"step": step} | values)
        reporter.log(values, step)
        reporter.say(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))

    steps = training_steps(loader, sampler, epochs=config.epochs)
    every = config.run_val_every_n_steps
    with closing(reporter):  # also when a step fails: the bar must not swallow the message
        validation_at(0)
        started = time.perf_counter()
        for number, step in enumerate(steps, start=1):
            values = train_step(model, step, config, world)
            rate = optimizer.param_groups[0]["lr"]
            values["grad_norm"] = update(model, optimizer, scheduler, config)
            report(reporter, number, values, rate, time.perf_counter() - started, world)
            started = time.perf_counter()
            last = number == num_steps
            if last:
                reporter.flush()  # before anything is saved: a loss that is not finite stops here
            if last or (every and number % every == 0):
                validation_at(number)
                started = time.perf_counter()
            if last:
                break
        folder = output / "model"
        base.save(folder, write=world.is_first)
        world.barrier()
        reporter.say(f"saved {folder}")
    return Trained(reporter.history, validations, folder)


def report(
    reporter: Reporter, number: int, values: dict[str, Any], rate: float, seconds: float,
    world: World,
) -> None:  # fmt: skip
    """Hand a step's values to the reporter; they are read when the next step has been launched."""
    values = dict(values)
    load = values.pop("load")  # [l, e]
    memory = peak_memory_gib(world.device)
    values |= {
        "lr": rate,
        "tokens_per_second": values.pop("tokens") / seconds,
        "max_violation": max_violation(load).max(),
        "dead_experts": dead_experts(load).sum(),
    }
    reporter.step(number, values | ({} if memory is None else {"peak_memory_gib": memory}))


def main(config: RecipeConfig) -> Trained:
    """Train as the configuration says; on every process of the launch."""
    with open_world(
        device=config.device, dp_replicate=config.dp_replicate, dp_shard=config.dp_shard
    ) as world:
        return run(config, world)


if __name__ == "__main__":
    sys.exit(launch(main, parse_command_line))
