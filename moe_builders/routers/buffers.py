"""Buffers that learn in small steps: a cast of the model leaves them in fp32 or wider."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def wide_buffers(module: nn.Module) -> Iterator[None]:
    """Around ``nn.Module._apply``: a module's own buffers move, but are not narrowed below fp32.

    bf16 cannot tell a bias from one that has moved by 0.001.
    """
    before = dict(module.named_buffers(recurse=False))
    yield
    for name, now in list(module.named_buffers(recurse=False)):
        if now.is_floating_point() and torch.finfo(now.dtype).bits < 32:
            # from what was there before: what is there now has lost digits
            setattr(module, name, before[name].to(now.device, torch.float32))
