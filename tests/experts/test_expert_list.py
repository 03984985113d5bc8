"""Experts as separate modules, against the stacked ones and one row at a time."""

import pytest
import torch
from helpers import assert_near, gradients, plain_activation, randomise
from helpers_decoder import D, decoder_of
from torch import nn
from torchtune.modules import FeedForward

from moe_builders.checkpoint.own import load_model, save_model
from moe_builders.errors import InputError
from moe_builders.experts import GroupedExperts
from moe_builders.experts.expert_list import ExpertList, ExpertNetwork
from moe_builders.initialization import initial_value, initialize
from moe_builders.moe import MoE, moe_layer
from moe_builders.ops.activations import ACTIVATIONS
from moe_builders.routers import TokenChoiceTopKRouter

COUNTS = [3, 0, 4, 1]  # and two dead rows


class Odd(nn.Module):
    """A network with a parameter that has no part in its answer's rows."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.norm(x) + self.shift


def networks():
    feed_forward = FeedForward(
        gate_proj=nn.Linear(6, 5), up_proj=nn.Linear(6, 5), down_proj=nn.Linear(5, 6)
    )
    return [nn.Linear(6, 6), Odd(), feed_forward, ExpertNetwork(dim=6, hidden_dim=3)]


def list_of():
    return randomise(ExpertList(networks())).double()


def test_no_row_at_all():
    """A process whose tokens are all padding: what waits for gradients gets zeros, rows too."""
    experts = list_of()
    x = torch.full((3, 6), torch.nan, dtype=torch.float64, requires_grad=True)
    answers = experts(x, torch.zeros(4, dtype=torch.int64))
    assert (answers == 0).all()
    assert not answers._is_view(), "FSDP2 warns of views, which lose its hooks"
    answers.sum().backward()
    assert x.grad is not None
    for gradient in (x.grad, *gradients(experts).values()):
        assert gradient is not None
        assert (gradient == 0).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_each_row_goes_through_its_expert(weighted):
    experts = list_of()
    x = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(10, dtype=torch.float64, requires_grad=True) if weighted else None
    probe = torch.randn(10, 6, dtype=torch.float64)
    numbers = [j for j, n in enumerate(COUNTS) for _ in range(n)]
    modules = list(experts.children())
    rows = [modules[j](x[row]) for row, j in enumerate(numbers)]
    if weighted:
        rows = [weights[row] * answer for row, answer in enumerate(rows)]
    wanted = torch.stack([*rows, *[torch.zeros(6).double()] * 2])
    (wanted * probe).sum().backward()
    wanted_grads = {name: g for name, g in gradients(experts).items() if g is not None}
    wanted_x, x.grad = x.grad, None

    dirty = x.detach().clone()
    dirty[8:] = float("nan")
    dirty.requires_grad_()
    row_weights = None
    if weighted:
        row_weights = weights.detach().clone()
        row_weights[8:] = float("nan")
    got = experts(dirty, torch.tensor(COUNTS), row_weights)
    (got * probe).sum().backward()
    assert_near(got, wanted, 1e-12)
    assert_near(dirty.grad, wanted_x, 1e-12)
    grads = gradients(experts)
    assert [name for name in grads if name not in wanted_grads] == [
        "1.shift", "1.norm.weight", "1.norm.bias"
    ]  # fmt: skip
    for name, gradient in wanted_grads.items():
        assert_near(grads[name], gradient, 1e-12, name)


@pytest.mark.parametrize("counts", [[0, 0, 0, 0], [10, 0, 0, 0], COUNTS], ids=str)
def test_every_parameter_of_an_idle_expert_gets_a_zero(counts):
    experts = list_of()
    experts.get_parameter("3.up_proj.weight").requires_grad_(False)
    experts(torch.randn(10, 6).double(), torch.tensor(counts)).square().sum().backward()
    for name, parameter in experts.named_parameters():
        rows = counts[int(name[0])]
        if name == "3.up_proj.weight":
            assert parameter.grad is None
        elif rows:
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name


def test_idle_experts_may_hold_nan():
    experts = list_of()
    with torch.no_grad():
        for parameter in experts.get_submodule("1").parameters():
            parameter.fill_(float("nan"))
    y = experts(torch.randn(10, 6).double(), torch.tensor(COUNTS))
    y.sum().backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in experts.parameters())


def test_a_list_stands_in_a_layer():
    for position in ("after", "mid"):
        router = TokenChoiceTopKRouter(dim=6, num_experts=4, experts_per_token=2)
        moe = MoE(router=router, experts=list_of().float(), score_position=position)
        y = moe(torch.randn(2, 5, 6))
        y.square().sum().backward()
        assert all(p.grad is not None for p in moe.parameters())
        assert moe.last_routing.num_tokens_per_expert.sum() == 20


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_network_by_hand(activation, scale, bias):
    network = ExpertNetwork(
        dim=6, hidden_dim=5, activation=activation, hidden_scale=scale, bias=bias
    )
    if scale:
        assert torch.equal(network.hidden_scale, torch.ones(5))
    assert not any(p.any() for name, p in network.named_parameters() if name.endswith("bias"))
    randomise(network).double()
    x = torch.randn(6, dtype=torch.float64)
    gated = ACTIVATIONS[activation].gated
    layers = [network.gate_proj, network.up_proj] if gated else [network.up_proj]
    assert (network.gate_proj is None) == (not gated)
    z = torch.cat([layer.weight @ x + (layer.bias if bias else 0) for layer in layers])
    hidden = plain_activation(activation, z) * (network.hidden_scale if scale else 1)
    wanted = network.down_proj.weight @ hidden + (network.down_proj.bias if bias else 0)
    assert_near(network(x), wanted, 1e-12)


def test_dropout_of_a_network():
    network = randomise(ExpertNetwork(dim=64, hidden_dim=5, dropout=0.5))
    x = torch.randn(20, 64)
    wanted = network.eval()(x)
    got = network.train()(x)
    kept = got != 0
    assert 0.4 < kept.float().mean() < 0.6
    assert_near(got[kept], 2 * wanted[kept], 1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ExpertList([]), "list of experts is empty"),
        (lambda: ExpertList([nn.Identity(), print]), "expert 1 is a builtin_function_or_method"),
        (lambda: ExpertList([nn.Identity(), nn.ReLU()] * 2), "experts 0 and 2 are the same"),
        (lambda: ExpertNetwork(dim=0, hidden_dim=1), r"dim \(0\)"),
        (lambda: ExpertNetwork(dim=1, hidden_dim=1, dropout=1.0), "dropout is 1.0"),
        (lambda: ExpertNetwork(dim=1, hidden_dim=1, activation="x"), "'x' is not one of"),
        (
            lambda: MoE(
                router=TokenChoiceTopKRouter(dim=6, num_experts=3, experts_per_token=1),
                experts=list_of(),
            ),
            "router serves 3 experts, but there are 4",
        ),
        (
            lambda: list_of()(torch.zeros(2, 6), torch.tensor([1, 1])),
            r"shape \(2,\), but there are 4 experts",
        ),
        (
            lambda: ExpertList([nn.Linear(6, 5)])(torch.zeros(2, 6), torch.tensor([2])),
            r"a Linear in the list of experts gave \(2, 5\) for rows \(2, 6\)",
        ),
    ],
)
def test_refused(build, message):
    with pytest.raises(InputError, match=message):
        build()


# initial weights: of a seed, not of the arrangement


def model_with(experts):
    def mlp(layer):
        router = TokenChoiceTopKRouter(dim=D, num_experts=4, experts_per_token=2)
        return MoE(router=router, experts=experts())

    return decoder_of(mlp=mlp, num_layers=2)


def feed_forwards():
    return ExpertList(
        [
            FeedForward(
                gate_proj=nn.Linear(D, 8), up_proj=nn.Linear(D, 8), down_proj=nn.Linear(8, D)
            )
            for _ in range(4)
        ]
    )


def test_the_same_seed_gives_the_same_weights_in_a_list():
    stacked = model_with(lambda: GroupedExperts(dim=D, hidden_dim=8, num_experts=4, bias=True))
    listed = model_with(feed_forwards)
    assert torch.is_grad_enabled()  # initialize needs no no_grad of its caller
    for model in (stacked, listed):
        initialize(model, seed=3, std=0.5)
        assert all(p.requires_grad and p.grad_fn is None for p in model.parameters())
    for layer in range(2):
        experts = stacked.layers[layer].mlp.experts
        for number, network in enumerate(listed.layers[layer].mlp.experts.children()):
            rows = experts.gate_up_proj[number]
            assert torch.equal(torch.cat((network.w1.weight, network.w3.weight)), rows)
            assert torch.equal(network.w2.weight, experts.down_proj[number])
            for linear in (network.w1, network.w2, network.w3):
                assert not linear.bias.any()
        gates = [m.layers[layer].mlp.router.gate.weight for m in (stacked, listed)]
        assert torch.equal(*gates)
        name = f"layers.{layer}.mlp.router.gate.weight"
        assert torch.equal(gates[0], initial_value(name, gates[0], seed=3, std=0.5))
    one, other = (listed.layers[layer].mlp.experts for layer in range(2))
    assert not torch.equal(one.get_parameter("0.w1.weight"), other.get_parameter("0.w1.weight"))


def test_a_hidden_scale_begins_at_one_in_any_arrangement():
    stacked = GroupedExperts(dim=6, hidden_dim=5, num_experts=2, hidden_scale=True)
    listed = ExpertList([ExpertNetwork(dim=6, hidden_dim=5, hidden_scale=True) for _ in range(2)])
    for module in (stacked, listed):
        randomise(module)
        initialize(module, seed=1, std=0.1)
        scales = [p for name, p in module.named_parameters() if name.endswith("hidden_scale")]
        assert scales
        assert all(torch.equal(p, torch.ones_like(p)) for p in scales)
    assert torch.equal(listed.get_parameter("1.down_proj.weight"), stacked.down_proj[1])
    assert initial_value("layers.0.mlp.experts.hidden_scale", stacked.hidden_scale, seed=1).all()


def test_experts_of_several_kinds_are_initialised_by_their_own_names():
    experts = list_of()
    initialize(experts, seed=5, std=0.1)
    value = experts.get_parameter("0.weight")
    assert torch.equal(value, initial_value("0.weight", value, seed=5, std=0.1))


def test_own_folders_keep_a_hidden_scale(tmp_path):
    def build():
        return decoder_of(
            num_layers=1,
            mlp=lambda layer: moe_layer(
                embed_dim=D, expert_hidden_dim=8, num_experts=4, hidden_scale=True, latent_dim=4,
                latent_bias=True,
            ),
        )  # fmt: skip

    model, other = build(), build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    save_model(model, tmp_path / "own")
    load_model(other, tmp_path / "own", device=torch.device("cpu"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert "layers.0.mlp.experts.hidden_scale" in model.state_dict()
