"""Buffers that a cast of the model does not narrow."""

import pytest
import torch
from torch import nn

from moe_builders.routers.buffers import wide_buffers


class Keeper(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.BatchNorm1d(2)
        self.register_buffer("level", torch.tensor([0.123456789]))
        self.register_buffer("table", torch.tensor([1, 2]))
        self.register_buffer("absent", None)

    def _apply(self, fn, recurse=True):
        with wide_buffers(self):
            return super()._apply(fn, recurse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_modules_own_buffers_keep_their_digits(dtype):
    keeper = Keeper()
    before = keeper.level.clone()
    assert keeper.to(dtype) is keeper
    assert keeper.level.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(keeper.level, before.to(keeper.level.dtype))
    assert keeper.table.dtype == torch.int64
    assert keeper.absent is None
    assert keeper.inner.running_mean.dtype == dtype, "those of another module are its own matter"
    assert set(dict(keeper.named_buffers(recurse=False))) == {"level", "table"}


def test_they_move():
    keeper = nn.Sequential(Keeper()).to("meta", torch.bfloat16)[0]
    assert keeper.level.is_meta
    assert keeper.level.dtype == torch.float32
