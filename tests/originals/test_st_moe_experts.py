"""ST-MoE's expert (GEGLU with a multiplicative bias) as one of ours, against st-moe-pytorch."""

import pytest
import torch
from helpers import assert_near, randomise

pytest.importorskip("st_moe_pytorch")

from st_moe_pytorch.st_moe_pytorch import Expert

from moe_builders.experts import GroupedExperts
from moe_builders.experts.expert_list import ExpertList

D, E = 12, 3
H = int(D * 4 * 2 / 3)
COUNTS = torch.tensor([3, 0, 4])


def turned(value):
    """Their second half gates; ours the first."""
    up, gate = value.chunk(2)
    return torch.cat((gate, up))


def theirs_of():
    return [randomise(Expert(D), seed).double() for seed in range(E)]


def stacked(take):
    return torch.stack([take(j) for j in range(E)])


def as_ours(nets):
    """{our name: values} from (Linear, GEGLU, Linear) of each."""
    return {
        "gate_up_proj": stacked(lambda j: turned(nets[j][0].weight)),
        "gate_up_bias": stacked(lambda j: turned(nets[j][0].bias)),
        "hidden_scale": stacked(lambda j: nets[j][1].mult_bias),
        "down_proj": stacked(lambda j: nets[j][2].weight),
        "down_bias": stacked(lambda j: nets[j][2].bias),
    }


def test_outputs_and_gradients():
    theirs = theirs_of()
    ours = GroupedExperts(
        dim=D, hidden_dim=H, num_experts=E, activation="geglu_exact", bias=True, hidden_scale=True
    ).double()
    nets = [expert.net for expert in theirs]
    ours.load_state_dict({name: v.detach().clone() for name, v in as_ours(nets).items()})
    x, probe = torch.randn(2, 9, D, dtype=torch.float64)
    wanted = torch.cat(
        [*[e(rows) for e, rows in zip(theirs, x[:7].split(COUNTS.tolist()), strict=True)],
         torch.zeros(2, D, dtype=torch.float64)]
    )  # fmt: skip
    got = ours(x, COUNTS)
    assert_near(got, wanted, 1e-12)
    (got * probe).sum().backward()
    (wanted * probe).sum().backward()
    for number in (0, 2):
        net = nets[number]
        for name, gradient in {
            "gate_up_proj": turned(net[0].weight.grad),
            "gate_up_bias": turned(net[0].bias.grad),
            "hidden_scale": net[1].mult_bias.grad,
            "down_proj": net[2].weight.grad,
            "down_bias": net[2].bias.grad,
        }.items():
            assert_near(ours.get_parameter(name).grad[number], gradient, 1e-12, name)
    assert not any(p.grad[1].any() for p in ours.parameters())


def test_their_experts_stand_in_a_list_of_ours():
    theirs = theirs_of()
    x = torch.randn(7, D, dtype=torch.float64)
    wanted = torch.cat([e(r) for e, r in zip(theirs, x.split(COUNTS.tolist()), strict=True)])
    assert_near(ExpertList(theirs)(x, COUNTS), wanted, 1e-14)
