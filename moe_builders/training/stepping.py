"""How an optimizer is applied: all at once, in backward, or with its states kept on the host.

Whichever way, ``optimizer.state[p]`` has the same entries between steps. torch's AdamW: ``step``, a
plain fp32 tensor [] (on the CPU, with ``fused`` beside the weights), ``exp_avg`` and ``exp_avg_sq``
of the parameter's shape and dtype, DTensors with its mesh and placements where it is sharded. Those
of ``low_bit`` are described there. With states on the host the plain tensors inside lie there
(pinned; call ``Stepper.wait`` before they are read), numbers like ``step`` where they were.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer


class Norm(Protocol):
    """What adds up gradients: ``parallel.grad_norm.GradNorm``."""

    def add(self, parameter: Tensor) -> None:
        """Count a parameter's gradient."""

    def total(self) -> Tensor:
        """Scalar, of all that were added since the last total."""
        ...


def step_alone(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> None:
    """Let an optimizer step one parameter with its group's arguments, and nothing else.

    The same arithmetic as in a step of all: optimizers treat parameters one by one. The optimizer
    stays one object with all groups, so schedules and states need not know.
    """
    groups, members = optimizer.param_groups, group["params"]
    optimizer.param_groups, group["params"] = [group], [parameter]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups, group["params"] = groups, members


class HostStates:
    """An optimizer's states, kept elsewhere and brought in one parameter at a time.

    Of each entry of ``optimizer.state[p]`` with at least one dim the plain tensors inside (a
    sharded or quantised one has them) are moved; between steps the entry is as it would be, with
    those tensors elsewhere.

    Args:
        optimizer: whose states; they are made on the device in the first step, and leave it then.
        to_device: gives a copy of a plain tensor where the optimizer computes.
        to_host: gives a copy where states are kept; with a second tensor: copies into that one,
            which an earlier call gave.
        wait: returns when all copies are complete.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        to_device: Callable[[Tensor], Tensor],
        to_host: Callable[[Tensor, Tensor | None], Tensor],
        wait: Callable[[], None],
    ) -> None:
        self.optimizer = optimizer
        self.to_device, self.to_host, self.wait = to_device, to_host, wait

    def step_alone(self, optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> None:
        """``step_alone`` with the parameter's states on the device for as long as it takes."""
        state = self.optimizer.state[parameter]
        kept = {key: value for key, value in state.items() if _is_kept(value)}
        for key, value in kept.items():
            state[key] = _map_plain(self.to_device, value)
        step_alone(optimizer, group, parameter)
        for key, value in state.items():
            if _is_kept(value):
                old = kept.get(key)
                moved = _map_plain(self.to_host, value, old)
                state[key] = moved if old is None else old


def host_states(optimizer: Optimizer, device: torch.device) -> HostStates:
    """States in the host's pinned memory; copies go along with the device's work."""

    def to_host(tensor: Tensor, into: Tensor | None) -> Tensor:
        if into is None:
            into = torch.empty_like(tensor, device="cpu", pin_memory=True)
        return into.copy_(tensor, non_blocking=True)

    return HostStates(
        optimizer,
        to_device=lambda tensor: tensor.to(device, non_blocking=True),
        to_host=to_host,
        wait=lambda: torch.cuda.synchronize(device),
    )


class Stepper:
    """Applies an optimizer to the gradients of a step, and tells their norm.

    Args:
        optimizer: stays whole: schedules and checkpoints use it as ever.
        norm: adds up the gradients' norm.
        in_backward: step each parameter as soon as its gradient is complete, and free that; the
            norm is then of gradients that are gone, and there is nothing to clip.
        states: where the states are kept, if not beside the weights.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        norm: Norm,
        *,
        in_backward: bool = False,
        states: HostStates | None = None,
    ) -> None:
        self.optimizer, self.in_backward = optimizer, in_backward
        self.parameters: list[Tensor] = [p for g in optimizer.param_groups for p in g["params"]]
        self._norm, self._states = norm, states
        self._step_alone = step_alone if states is None else states.step_alone
        self._group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
        if in_backward:
            for parameter in self.parameters:
                parameter.register_post_accumulate_grad_hook(self._step_and_free)

    def norm(self) -> Tensor:
        """Of all gradients of the step on all processes, as they came; scalar fp64."""
        if not self.in_backward:
            for parameter in self.parameters:
                self._norm.add(parameter)
        return self._norm.total()

    def step(self) -> None:
        """Apply and free what gradients there are: none, if it was done in backward."""
        if self._states is None and not self.in_backward:
            self.optimizer.step()
        elif not self.in_backward:
            for parameter, group in self._group_of.items():
                if parameter.grad is not None:
                    self._step_alone(self.optimizer, group, parameter)
        self.optimizer.zero_grad(set_to_none=True)

    def make_states(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Give parameters (None: all) the states that their first step would; change no weight.

        A resume fills them afterwards: their structure is then that of the run that saved them,
        and they lie where this run keeps its own. One by one: gradients of a whole model might not
        fit beside it.
        """
        for parameter in self.parameters if parameters is None else parameters:
            group = self._group_of[parameter]
            rate = group["lr"]
            group["lr"] = torch.zeros_like(rate) if isinstance(rate, Tensor) else 0.0
            parameter.grad = torch.zeros_like(parameter)
            try:
                self._step_alone(self.optimizer, group, parameter)
            finally:
                parameter.grad, group["lr"] = None, rate

    def wait(self) -> None:
        """Until states that are kept on the host are complete there: before they are read."""
        if self._states is not None:
            self._states.wait()

    def _step_and_free(self, parameter: Tensor) -> None:
        self._norm.add(parameter)
        self._step_alone(self.optimizer, self._group_of[parameter], parameter)
        parameter.grad = None


def build_stepper(
    optimizer: Optimizer, norm: Norm, device: torch.device, *, in_backward: bool, offload: bool
) -> Stepper:
    """A ``Stepper`` as a config says; ``offload`` needs a GPU (``offloading.require_gpu``)."""
    states = host_states(optimizer, device) if offload else None
    return Stepper(optimizer, norm, in_backward=in_backward, states=states)


def _is_kept(value: Any) -> bool:
    """Not a number like ``step``, which optimizers keep where they want it."""
    return isinstance(value, Tensor) and value.ndim > 0


def _map_plain(function: Callable[..., Tensor], tensor: Any, *others: Any) -> Any:
    """A function over the plain tensors that a sharded or quantised one is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return function(tensor, *others)
    names, context = tensor.__tensor_flatten__()
    inner = {}
    for name in names:
        part = getattr(tensor, name)
        if isinstance(part, Tensor):
            same = [None if other is None else getattr(other, name) for other in others]
            part = _map_plain(function, part, *same)
        inner[name] = part  # a sharded tensor also names its mesh
    return type(tensor).__tensor_unflatten__(inner, context, tensor.size(), tensor.stride())
