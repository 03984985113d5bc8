"""One training step of the recipe, and tensors from which no value can be read.

A tensor on the meta device has no values: ``item``, ``tolist``, ``bool``, indexing with a mask and
``nonzero`` raise there, wherever they stand. Code that asks for "cpu" takes the ways of a GPU.
"""

import moe_full_finetune as recipe
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moe_builders.moe import moe_layer_names
from moe_builders.training.finite_watch import FiniteWatch
from moe_builders.training.optimizer import build_scheduler
from moe_builders.training.param_groups import learning_rates
from moe_builders.training.reporting import Reporter


class Trainer:
    """What ``run`` does in a step, in its order, with what it makes before."""

    def __init__(self, cfg, world, model, optimizer, stepper):
        self.cfg, self.world, self.model, self.optimizer = cfg, world, model, optimizer
        self.stepper = stepper
        self.scheduler = build_scheduler(cfg.lr_scheduler, optimizer, num_steps=10)
        self.watch = model.probe = FiniteWatch(num_layers=len(model.layers))
        self.reporter = Reporter(
            [], total=10, every=1, show=False, layers=moe_layer_names(model), log_layers=True,
            log_experts=1,
        )  # fmt: skip
        self.number = 0

    def step(self, batches):
        self.number += 1
        values = dict(recipe.train_step(self.model, batches, self.cfg, self.world))
        values |= learning_rates(self.optimizer)
        watched = self.watch.take(self.model.named_parameters())
        values["grad_norm"] = recipe.update(self.stepper, self.scheduler, self.cfg)
        recipe.teach_routers(self.model, values.pop("tally"))
        recipe.report(self.reporter, self.number, values, watched, 1.0, None, self.world)


class NoWaitingCopies(TorchFunctionMode):
    """Refuses copies between the host and the device that the host would wait for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor) and result.is_meta:
            raise AssertionError("a tensor is made from the host's numbers on the device")
        if func in (Tensor.to, Tensor.copy_, Tensor.cpu, Tensor.cuda):
            source = args[1] if func is Tensor.copy_ else args[0]
            if isinstance(source, Tensor) and source.device != result.device and source.ndim:
                assert kwargs.get("non_blocking"), f"{func.__name__} waits for the device"
        return result


class OnTheWayFromNowhere:
    """In the place of ``OnTheWay``: the copy to the host that nobody waits for."""

    def __init__(self, tensors):
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}

    def values(self):
        return {n: torch.ones(s, dtype=torch.float64) for n, s in self.shapes.items()}
