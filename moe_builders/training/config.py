"""The recipe's configuration: every key with type, unit and default; unknown ones are refused."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from moe_builders.errors import InputError
from moe_builders.instantiate import did_you_mean
from moe_builders.ops.output_loss import WAYS
from moe_builders.training.overrides import apply_overrides, one_line
from moe_builders.training.renamed import rename_old_keys
from moe_builders.training.schema import (
    above,
    at_least,
    check_ranges,
    one_of,
    unknown_key,
    wrong_type,
)
from moe_builders.training.together import check_together

DTYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64,
}  # fmt: skip


@dataclass
class RouterLossConfig:
    """Losses on the routing; with a coefficient of 0 one is only watched."""

    load_balancing_coef: float = at_least(0, default=0.0)
    load_balancing_scope: str = one_of("sequence", "micro", "global")
    global_exact: bool = False  # scope global: count a whole step first (one more forward)
    # switch: e·Σ f·P | mse: of mean scores | st_moe: first choices | hf: transformers', over layers
    load_balancing_form: str = one_of("switch", "mse", "st_moe", "hf")
    # what is counted: choices before any was dropped, or what experts were given
    load_balancing_on: str = one_of("assigned", "kept")
    z_coef: float = at_least(0, default=0.0)
    own_coef: float = at_least(0, default=0.01)  # of what routers ask for (expert choice's BCE)
    # which tokens count: padding = all real ones | labels = labelled ones
    mask: str = one_of("padding", "labels")


@dataclass
class ExpertBiasConfig:
    """How a selection-only bias learns after each step (loss-free balancing)."""

    update_rate: float = at_least(0, default=0.0)  # 0: the bias stays as it is
    # sign: ± update_rate | quantile: update_rate of the way to the bias that would balance the step
    rule: str = one_of("sign", "quantile")
    recenter: bool = False  # subtract the mean afterwards


@dataclass
class RoutingConfig:
    """What is laid over the routers of every layer."""

    capacity_factor: float | None = above(0, default=None)  # in training; null: no limit
    eval_capacity_factor: float | None = above(0, default=None)  # null: no limit
    min_capacity: int = at_least(1, default=4)  # tokens per expert
    capacity_scope: str = one_of("sequence", "micro")  # tokens that share the limit
    drop: str = one_of("position", "probs")  # position: the latest | probs: the lowest weights
    pad_to_capacity: bool = False  # every expert computes its full capacity
    jitter: str = one_of("none", "logit_gaussian", "input_uniform", "gumbel")  # in training
    jitter_scale: float = at_least(0, default=0.0)


@dataclass
class ProfilerConfig:
    """torch's profiler on some steps of a run."""

    enabled: bool = False
    wait_steps: int = at_least(0, default=2)  # left alone at first
    warmup_steps: int = at_least(0, default=1)  # profiled and thrown away
    active_steps: int = at_least(1, default=3)  # profiled
    record_shapes: bool = False
    with_stack: bool = False
    profile_memory: bool = False


@dataclass
class RecipeConfig:
    """Configuration of ``moe_full_finetune``; names as in torchtune where it has the key."""

    output_dir: str = MISSING  # everything a run writes
    base_model: str | None = None  # HF folder, or a folder that a run saved under our own names
    model: Any = None  # component; null: what base_model's config.json says
    router: Any = None  # component, in place of every layer's; null: the model's own
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    expert_bias: ExpertBiasConfig = field(default_factory=ExpertBiasConfig)
    # of a model without base_model; null: as its modules drew it
    init_std: float | None = at_least(0, default=0.02)
    tokenizer: Any = None  # component; null: of base_model

    dataset: Any = MISSING  # component, or a list of them
    dataset_val: Any = None  # component, or a list of them
    max_seq_len: int = at_least(1, default=2048)  # tokens; longest row
    shuffle: bool = True
    shuffle_window: int = at_least(1, default=1024)  # documents of a stream shuffled together
    num_workers: int = at_least(0, default=0)  # processes that prepare batches ahead
    prefetch_factor: int = at_least(1, default=2)  # batches that each of them keeps ready
    # samples longer than max_seq_len
    long_samples: str = one_of("truncate", "split", "refuse")
    pad_to_multiple_of: int = at_least(1, default=1)  # tokens; rows not packed are rounded up

    batch_size: int = at_least(1, default=1)  # rows of a micro-batch on one process
    gradient_accumulation_steps: int = at_least(1, default=1)  # micro-batches a step
    epochs: int = at_least(1, default=1)
    max_steps: int | None = at_least(1, default=None)  # optimizer steps in all; null: epochs
    seed: int = at_least(0, default=0)

    optimizer: Any = MISSING  # component; gets the parameters in groups
    # {match: regex of parameter names, argument of the optimizer: value, ...}; the first wins
    param_groups: list[Any] = field(default_factory=list)
    freeze: list[str] = field(default_factory=list)  # regexes of names that do not learn
    freeze_router: bool = False
    optimizer_in_bwd: bool = False  # step each parameter in backward, free its gradient
    offload_optimizer: bool = False  # optimizer states in the host's memory; GPU only
    lr_scheduler: Any = None  # component; gets the optimizer and num_training_steps
    clip_grad_norm: float | None = above(0, default=1.0)  # null: no clipping
    router_losses: RouterLossConfig = field(default_factory=RouterLossConfig)

    device: str = one_of("auto", "cpu", "cuda")
    param_dtype: str = one_of(*DTYPES)  # storage
    compute_dtype: str = one_of(*DTYPES)  # forward and backward
    dp_replicate: int = 1  # copies of the sharded model
    dp_shard: int = -1  # processes that share one copy; -1: all that remain
    ep: int = 1  # processes among which the experts are dealt out; all have rows of their own
    ep_dispatcher: str = one_of("all_to_all", "all_gather")  # how tokens reach their experts
    # until a process that does not answer ends the run; torch's own default for NCCL is 10
    timeout_minutes: float = at_least(1, default=30.0)
    reshard_after_forward: bool = True  # free gathered layers between forward and backward
    enable_activation_checkpointing: bool = False
    ac_mode: str = one_of("full", "selective")  # selective: experts are not recomputed
    enable_activation_offloading: bool = False  # what is kept of them on the host; GPU only
    # chunked: some tokens at a time | torch, liger: by theirs | none: from whole logits
    linear_cross_entropy: str = one_of(*WAYS)
    # auto: the best that fits | bmm: padded rows | liger: its kernels; GPU only
    expert_backend: str = one_of("auto", "grouped", "loop", "bmm", "liger")
    recompute_up: bool = False  # experts keep tokens alone; one more product in backward
    compile: bool = False  # torch.compile each layer; needs a C++ compiler

    checkpoint_every_n_steps: int | None = at_least(1, default=None)  # null: at a signal only
    keep_last: int | None = at_least(1, default=2)  # checkpoints; null: all
    enable_async_checkpointing: bool = False  # write them while training goes on
    resume: str = "auto"  # auto: from the newest checkpoint | never | a checkpoint's folder
    # validations without a better loss after which the run ends; null: never
    early_stop_patience: int | None = at_least(1, default=None)
    early_stop_min_delta: float = at_least(0, default=0.0)  # nats by which better is better
    deterministic: bool = False  # refuse what depends on the order of threads

    metric_logger: Any = None  # component, or a list of them; null: a file under output_dir/logs
    log_every_n_steps: int = at_least(1, default=1)
    log_layers: bool = False  # each layer's load values too, and how layers and experts differ
    log_experts: int = at_least(0, default=0)  # so many of the most and of the least used ones
    plots: bool = False  # PNG files of expert load and curves; needs matplotlib
    # dense TFLOP/s of one device, for MFU; null: a known GPU's, where it computes in bf16
    peak_tflops: float | None = above(0, default=None)
    profiler: ProfilerConfig = field(default_factory=ProfilerConfig)
    # null: before the first and after the last step
    run_val_every_n_steps: int | None = at_least(1, default=None)


def configs_root() -> Path:
    """The folder of built-in configs: in a wheel inside the package, else the repository's."""
    package = Path(__file__).parents[1]
    packed = package / "_configs"
    return packed if packed.is_dir() else package.parent / "configs"


def find_config(name: str) -> Path:
    """A config file's path, or a built-in config by name (``family/name``).

    Raises:
        InputError: neither; the built-in names are listed.
    """
    if Path(name).is_file():
        return Path(name)
    if Path(name).is_dir():
        raise InputError(f"config {name!r} is a folder, but must be a YAML file or a built-in name")
    root = configs_root()
    built_in = root / f"{name.removesuffix('.yaml')}.yaml"
    if built_in.is_file():
        return built_in
    names = sorted(str(p.relative_to(root).with_suffix("")) for p in root.rglob("*.yaml"))
    raise InputError(
        f"config {name!r} is neither a file nor a built-in name{did_you_mean(name, names)}; "
        f"built-in are: {', '.join(names)}"
    )


def parse_command_line(
    argv: Sequence[str] | None = None, schema: type[RecipeConfig] = RecipeConfig
) -> RecipeConfig:
    """``--config NAME [key=value ...] [~key ...]`` as a typed configuration.

    As in torchtune, ``optimizer=x.y`` exchanges a component and keeps its arguments (``router=x.y``
    names one where there is none), and
    ``~optimizer.fused`` takes an argument out; ``~key`` sets one of the recipe's own keys to null.

    Args:
        argv: arguments without the program's name; None: the process's own.
        schema: ``RecipeConfig``, or a recipe's own dataclass derived from it with more keys.

    Raises:
        InputError: an unknown config, key or type; each in one sentence.
    """
    parser = argparse.ArgumentParser(
        description="key=value overrides follow the config.", allow_abbrev=False
    )
    parser.add_argument("--config", nargs="?", help="a YAML file or a built-in name")
    known, overrides = parser.parse_known_args(argv)
    if known.config is None:
        raise InputError("--config is missing: give it a YAML file or a built-in name")
    return load_config(find_config(known.config), overrides, schema)


def load_config(
    path: Path, overrides: Sequence[str] = (), schema: type[RecipeConfig] = RecipeConfig
) -> RecipeConfig:
    """A YAML file with overrides as a typed configuration; see ``parse_command_line``."""
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:  # yaml has many error classes without a common public base
        raise InputError(f"{path} is not valid YAML: {_where(error)}{one_line(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise InputError(f"{path} must hold key: value pairs")
    apply_overrides(loaded, overrides)
    return check_config(loaded, schema)


def check_config(values: DictConfig, schema: type[RecipeConfig] = RecipeConfig) -> RecipeConfig:
    """Match keys and types against the schema and its allowed words.

    Names of earlier versions are understood, with a FutureWarning.

    Raises:
        InputError: unknown key, wrong type, missing value, a word that is not allowed, or keys
            that do not go together.
    """
    given = OmegaConf.to_container(values)
    assert isinstance(given, dict)
    for key, entry in schema.__dataclass_fields__.items():
        value = given.get(key)
        if key in given and is_dataclass(entry.type) and not isinstance(value, dict):
            raise InputError(f"{key} is {value!r}, but must hold key: value pairs")
    values = rename_old_keys(values, schema.__dataclass_fields__)
    given = OmegaConf.to_container(values)
    assert isinstance(given, dict)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), values)
        config = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        key = error.full_key
        raise InputError(
            f"the config lacks a value for {key}: set it in the file, or add {key}=VALUE"
        ) from error
    except ConfigKeyError as error:
        key = str(error.full_key or error.key)
        raise InputError(unknown_key(schema, key)) from error
    except InterpolationResolutionError as error:
        raise InputError(
            f"{error.full_key}: {one_line(error)} (${{KEY}} stands for another key of the config, "
            "${oc.env:NAME} for an environment variable)"
        ) from error
    except OmegaConfBaseException as error:
        known = wrong_type(schema, str(error.full_key), given)
        raise InputError(known or f"{error.full_key}: {one_line(error)}") from error
    assert isinstance(config, RecipeConfig)
    check_ranges(config)
    check_together(config)
    return config


def _where(error: Exception) -> str:
    """The place that an error of YAML has marked."""
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
