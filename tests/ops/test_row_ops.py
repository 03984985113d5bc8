"""The plain passes over rows: fp32 within, one rounding at the end."""

import pytest
import torch
from helpers import assert_near

from moe_builders.ops.activations import ACTIVATIONS
from moe_builders.ops.row_ops import activate, activate_backward, sum_slots


@pytest.mark.parametrize("kind", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_half_precision_is_rounded_once(kind):
    half = torch.bfloat16
    z, weights = torch.randn(40, 16).to(half), torch.rand(40)
    wide = kind.function(z.float())  # [a, h]
    grad = torch.randn(wide.shape).to(half)
    assert torch.equal(activate(z, kind), wide.to(half))
    assert torch.equal(activate(z, kind, weights), (wide * weights[:, None]).to(half))
    z_grad, hidden, weights_grad = activate_backward(z, grad, kind, weights)
    assert torch.equal(hidden, (wide * weights[:, None]).to(half))
    assert torch.equal(z_grad, kind.gradient(z.float(), grad.float() * weights[:, None]).to(half))
    assert_near(weights_grad, (grad.float() * wide).sum(-1), 1e-6)


def test_nothing_is_added_up_to_nothing():
    """Also where there are tokens but no columns, which torch's bags of embeddings refuse."""
    slots = torch.arange(6).view(2, 3)
    assert sum_slots(torch.zeros(6, 0), slots).shape == (2, 0)
    assert sum_slots(torch.zeros(6, 0), slots, torch.ones(6)).shape == (2, 0)
    none = torch.empty(0, 3, dtype=torch.int64)
    assert sum_slots(torch.zeros(0, 4), none).shape == (0, 4)
