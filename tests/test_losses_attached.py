"""A loss on a tensor's way back: the gradients of adding it, once, also when recomputed."""

import pytest
import torch
from helpers import assert_same_bits, gradients, moe_of
from torch.utils.checkpoint import checkpoint

from moe_builders.errors import InputError
from moe_builders.losses import attach_loss, load_balancing_loss

X = torch.randn(2, 9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def balance(moe):
    return 0.3 * load_balancing_loss(moe.last_routing, scope="micro")


def attached(moe, x):
    y = moe(x)
    return attach_loss(y, balance(moe))


def added():
    moe = moe_of()
    y = moe(X)
    (y.square().sum() + balance(moe)).backward()
    return gradients(moe)


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_gradients_are_those_of_adding_it(use_reentrant):
    moe, forwards = moe_of(), []
    moe.router.register_forward_hook(lambda *_: forwards.append(1))
    x = X.clone().requires_grad_()  # the reentrant way needs an input with a gradient
    if use_reentrant is None:
        y = attached(moe, x)
    else:
        y = checkpoint(attached, moe, x, use_reentrant=use_reentrant)
    assert torch.equal(y, moe_of()(X)), "the values are untouched"
    y.square().sum().backward()
    assert len(forwards) == (1 if use_reentrant is None else 2), "it was recomputed"
    found = gradients(moe)
    assert_same_bits(found, added())
    moe(X).square().sum().backward()
    gate = "router.gate.weight"
    assert (gradients(moe)[gate] - found[gate]).abs().max() > 1e-4, "without it is another one"


def test_a_scale_of_what_is_differentiated_does_not_reach_it():
    gate = torch.ones((), dtype=torch.float64, requires_grad=True)
    y = attach_loss(torch.ones(3, requires_grad=True), gate * 5)
    (1000 * y.sum()).backward()
    assert float(gate.grad) == 5


def test_refused():
    with pytest.raises(InputError, match=r"must be a scalar, but its shape is \[2\]"):
        attach_loss(torch.ones(3), torch.ones(2))
