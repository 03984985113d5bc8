"""AdamW with states of 8 or 4 bits, or of fp32, and stochastic rounding of bf16 weights.

torchao's optimizers (its states, its update) made to fit sharded models:

* Norms, biases and routers keep fp32 states: groups carry ``quantize``, which
  ``optimizer.build_optimizer`` sets False for them.
* A state that is not quantised is fp32, where torchao gives it the weights' dtype.
* The update runs on each process's own shards: torchao's rounding mixes plain and sharded tensors.
* Rounding draws from a stream of its own for each parameter, step and shard. Copies of a shard
  (``dp_replicate``) draw the same and stay equal; different shards draw independently; neither
  the order of the parameters nor the run's other random numbers matter.

``optimizer.state[p]`` holds, from the parameter's first step on:

========================  =================================================================
``step``                  plain fp32 tensor [] on the CPU
``exp_avg, exp_avg_sq``   of the parameter's shape and, where it is sharded, a DTensor with its
                          mesh and placements. The (local) tensor is plain fp32, or torchao's
                          ``OptimState8bit`` / ``OptimState4bit``, whose ``__tensor_flatten__``
                          names ``codes`` (uint8; 8 bits: the local shape; 4 bits: [n / 2]),
                          ``scale`` (fp32 [n / block_size]) and ``qmap`` (fp32 [256] or [16],
                          constant), for n local values
========================  =================================================================

Which of the two depends on shapes alone and is the same on every process. ``lr`` of each group is
an fp32 tensor [] on the CPU, which torch's schedulers fill.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torchao.optim
from torch import Tensor, nn
from torch.optim import Optimizer

from moe_builders.errors import InputError
from moe_builders.training.compiling import require_cpp_compiler
from moe_builders.training.shards import (
    like_sharded,
    local_tensor,
    random_stream,
    shard_number,
    shard_numels,
)

_SMALLEST = 4096  # values of a shard; torchao's limit, after bitsandbytes
_LISTED = 8  # parameters named in a report


class _OnShards:
    """What our three optimizers do differently from torchao's; mixed in before them."""

    block_size: float
    bf16_stochastic_round: bool
    is_adamw: bool
    defaults: dict[str, Any]
    state: Any
    param_groups: list[dict[str, Any]]
    _numbers: dict[Tensor, int]
    _subclass_zeros: Callable[..., Tensor]

    def _finish(self, *, quantize: bool, rounding_seed: int) -> None:
        """After torchao's constructor: our own arguments."""
        require_cpp_compiler(type(self).__name__, "take torch.optim.AdamW with param_dtype=fp32")
        self.defaults["quantize"] = quantize
        for group in self.param_groups:
            group.setdefault("quantize", quantize)
        self.rounding_seed = rounding_seed

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; each parameter gets the number that its rounding is known by."""
        super().add_param_group(param_group)  # pyright: ignore[reportAttributeAccessIssue]
        numbers = self.__dict__.setdefault("_numbers", {})
        for parameter in self.param_groups[-1]["params"]:
            numbers[parameter] = len(numbers)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter with a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch._dynamo.utils.disable_cache_limit():  # one compilation a shape is meant
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            quantize = group["quantize"] and can_quantize(parameter, self.block_size)
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = self._zeros(parameter, quantize=quantize, signed=True)
            state["exp_avg_sq"] = self._zeros(parameter, quantize=quantize, signed=False)
        state["step"] += 1
        own = local_tensor(parameter)
        if own.numel() == 0:  # more processes than rows: nothing to compile an update for
            return
        rounds = self.bf16_stochastic_round and own.dtype == torch.bfloat16
        seed = self._stream(parameter, int(state["step"])) if rounds else None
        with random_stream(own.device, seed):
            _compiled_update()(
                own.detach(),
                local_tensor(parameter.grad),
                state["step"],
                local_tensor(state["exp_avg"]),
                local_tensor(state["exp_avg_sq"]),
                None,
                group["lr"],
                group["betas"][0],
                group["betas"][1],
                group["weight_decay"],
                group["eps"],
                self.is_adamw,
                rounds,
            )

    def _zeros(self, parameter: Tensor, *, quantize: bool, signed: bool) -> Tensor:
        """A fresh state: fp32 or quantised, sharded as the parameter is."""
        own = local_tensor(parameter)
        if quantize:
            local = self._subclass_zeros(own, signed, self.block_size)
        else:
            local = torch.zeros_like(own, dtype=torch.float32)
        return like_sharded(local, parameter)

    def _stream(self, parameter: Tensor, step: int) -> int:
        """The seed of one rounding: another for each parameter, step and shard."""
        key = (self.rounding_seed, self._numbers[parameter], step, *shard_number(parameter))
        value = 0
        for part in key:  # splitmix64's finaliser over the parts: near keys give far seeds
            value = (value + part + 0x9E3779B97F4A7C15) % 2**64
            value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
            value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
            value ^= value >> 31
        return value >> 1

    def unquantized(self) -> list[Tensor]:
        """Parameters that were to be quantised, but whose shards the blocks do not fit."""
        return [
            parameter
            for group in self.param_groups
            for parameter in group["params"]
            if group["quantize"] and not can_quantize(parameter, self.block_size)
        ]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which however would give fp32 states of bf16 weights the weights' dtype."""
        super().load_state_dict(state_dict)  # pyright: ignore[reportAttributeAccessIssue]
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        members = [p for group in self.param_groups for p in group["params"]]
        for number, parameter in zip(saved, members, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                device = value.device if key == "step" else parameter.device
                self.state[parameter][key] = value.to(device)


class _Quantised(_OnShards):
    """The constructor of those that quantise; they differ in ``block`` and torchao's class."""

    block: int

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        block_size: int | None = None,
        bf16_stochastic_round: bool = True,
        quantize: bool = True,
        rounding_seed: int = 0,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay,  # pyright: ignore[reportCallIssue] torchao's comes next
            block_size=_positive(self.block if block_size is None else block_size),
            bf16_stochastic_round=bf16_stochastic_round,
        )  # fmt: skip
        self._finish(quantize=quantize, rounding_seed=rounding_seed)


class AdamW8bit(_Quantised, torchao.optim.AdamW8bit):
    """AdamW with 8-bit states, quantised in blocks: 2.03 bytes a parameter for both.

    Args:
        params: parameters or groups; a group may differ in lr, betas, eps, weight_decay, quantize.
        lr, betas, eps, weight_decay: as torch's AdamW.
        block_size: values that share a scale; None: 256 (``AdamW4bit``: 128).
        bf16_stochastic_round: round bf16 weights up or down by chance, so that updates smaller
            than their resolution count on average; no effect on fp32 weights.
        quantize: False: fp32 states.
        rounding_seed: of the rounding's random numbers.

    Raises:
        InputError: no C++ compiler.

    Source: Dettmers et al. 2022 (2110.02861), as in torchao; it compiles one update a shape.
    """

    block = 256


class AdamW4bit(_Quantised, torchao.optim.AdamW4bit):
    """AdamW with 4-bit states: 1.06 bytes a parameter for both; else as ``AdamW8bit``.

    Source: Li et al. 2023 (2309.01507), as in torchao.
    """

    block = 128


class AdamW(_OnShards, torchao.optim._AdamW):
    """AdamW with fp32 states, 8 bytes a parameter, that may store its weights in bf16."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        bf16_stochastic_round: bool = True,
        rounding_seed: int = 0,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, bf16_stochastic_round=bf16_stochastic_round
        )
        self._finish(quantize=False, rounding_seed=rounding_seed)


def can_quantize(parameter: Tensor, block_size: float) -> bool:
    """Whether the shards on *all* processes are large enough and whole blocks.

    All, so that no process keeps another kind of state than its neighbour.
    """
    return all(n >= _SMALLEST and n % block_size == 0 for n in shard_numels(parameter))


def describe_unquantized(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """A line to show once: what keeps fp32 states although it was to be quantised; or nothing."""
    left = {id(p) for p in getattr(optimizer, "unquantized", list)()}
    if not left:
        return []
    named = [(name, p) for name, p in model.named_parameters() if id(p) in left]
    shown = ", ".join(f"{name} {list(p.shape)}" for name, p in named[:_LISTED])
    more = f" and {len(named) - _LISTED} more" if len(named) > _LISTED else ""
    mib = sum(max(shard_numels(p)) for _, p in named) * 8 / 2**20
    return [
        f"{type(optimizer).__name__} keeps fp32 states for {len(named)} parameters, {mib:.1f} MiB "
        f"a process: their shards have fewer than {_SMALLEST} values or are no whole blocks of "
        f"{getattr(optimizer, 'block_size', None)}: {shown}{more}"
    ]


@functools.cache
def _compiled_update() -> Callable[..., None]:
    from torchao.optim.adam import single_param_adam

    return torch.compile(single_param_adam, fullgraph=True, dynamic=False)


def _positive(block_size: int) -> int:
    if block_size < 2 or block_size % 2:
        raise InputError(f"block_size is {block_size}, but must be an even number of at least 2")
    return block_size
