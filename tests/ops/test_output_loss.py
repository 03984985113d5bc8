"""Which way can be gone where, and that the ways agree."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_near
from torch import nn

from moe_builders.errors import InputError
from moe_builders.ops.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy_sum
from moe_builders.ops.output_loss import check_way, output_cross_entropy_sum, weight_and_bias

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_ways_that_can_be_gone(monkeypatch):
    monkeypatch.setattr(F, "linear_cross_entropy", object(), raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for way, device in (("chunked", CPU), ("none", CPU), ("torch", CPU), ("liger", GPU)):
        assert check_way(way, device) == way


def test_ways_that_cannot(monkeypatch):
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for way, device, message in (
        ("fused", CPU, r"^linear_cross_entropy 'fused' is not one of chunked, torch, liger, none$"),
        ("torch", CPU, r"^linear_cross_entropy=torch needs torch 2.13 or newer, and this is \d"),
        ("liger", CPU, r"^linear_cross_entropy=liger needs a GPU, but the device is cpu"),
        ("liger", GPU, r"not installed: pip install liger-kernel, or set linear_cross_entropy=ch"),
    ):
        with pytest.raises(InputError, match=message):
            check_way(way, device)


def given(dtype=torch.float64):
    h = torch.randn(11, 4, dtype=dtype)
    labels = torch.randint(0, 7, (11,))
    labels[2:5] = IGNORE_INDEX
    h[2:5] = torch.nan
    return h, torch.randn(7, 4, dtype=dtype), torch.randn(7, dtype=dtype), labels


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has none")
def test_torchs_way_and_ours_agree_on_nan_scale_and_divisor():
    h, weight, bias, labels = given()
    found = []
    for way in ("torch", "chunked"):
        leaves = [t.clone().requires_grad_() for t in (h, weight, bias)]
        loss = output_cross_entropy_sum(
            *leaves, labels, way=way, scale=0.3, divisor=torch.tensor(5)
        )
        loss.backward()
        found.append([loss, *[leaf.grad for leaf in leaves]])
    for got, wanted in zip(*found, strict=True):
        assert_near(got, wanted, 1e-12)


def test_liger_is_asked_for_a_sum_in_fp32(monkeypatch):
    """Its kernels need a GPU; what they are given does not."""
    asked = {}

    class Loss(nn.Module):
        def __init__(self, **arguments):
            super().__init__()
            asked.update(arguments)

        def forward(self, lin_weight, _input, target, bias=None):
            return linear_cross_entropy_sum(_input, lin_weight, bias, target)

    module = ModuleType("liger_kernel.transformers.fused_linear_cross_entropy")
    module.LigerFusedLinearCrossEntropyLoss = Loss
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    h, weight, bias, labels = given()
    got, wanted = (
        output_cross_entropy_sum(
            h, weight, bias, labels, way=way, scale=0.3, divisor=torch.tensor(5)
        )
        for way in ("liger", "chunked")
    )
    assert_near(got, wanted, 1e-12)
    assert asked == {
        "ignore_index": IGNORE_INDEX, "reduction": "sum", "accum_dtype": torch.float32
    }  # fmt: skip


def test_what_has_a_weight():
    linear = nn.Linear(3, 5)
    assert weight_and_bias(linear) == (linear.weight, linear.bias)
    with pytest.raises(
        InputError, match=r"^the output is a SimpleNamespace, but without logits it"
    ):
        weight_and_bias(SimpleNamespace(weight=1))
