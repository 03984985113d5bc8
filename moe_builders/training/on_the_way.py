"""Values of a step on their way from the device to the host."""

from collections.abc import Mapping

import torch
from torch import Tensor


class OnTheWay:
    """Tensors copied from the device, all in one piece, without waiting for it."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.arrived = None
        self.numbers = torch.zeros(0, dtype=torch.float64)
        if tensors:
            flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors.values()])
            self.numbers = flat.to("cpu", non_blocking=True)
            if flat.is_cuda:
                self.arrived = torch.cuda.Event()
                self.arrived.record()

    def values(self) -> dict[str, Tensor]:
        """They, in fp64 on the host; waits until they have arrived."""
        if self.arrived is not None:
            self.arrived.synchronize()
        parts = self.numbers.split([shape.numel() for shape in self.shapes.values()])
        return {
            name: part.view(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }
