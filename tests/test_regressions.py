"""Defects that others have had, each held off where the parts meet; single parts have their own.

The list and what guards each: docs/sources.md.
"""

import pytest
import torch
from helpers import D, E, H, assert_near, gradients, moe_of, randomise
from helpers_decoder import batch, decoder_of

from moe_builders.experts import GroupedExperts
from moe_builders.losses import IGNORE_INDEX, cross_entropy_sum
from moe_builders.moe import MoE, collect_routing, moe_layer
from moe_builders.routers import ExpertChoiceTopKRouter, TokenChoiceTopKRouter
from moe_builders.routing import TokenInfo, check_routing, dense_weights, expert_of_rows
from moe_builders.training.objective import layer_counts, router_losses

POSITIONS = ["before", "mid", "after"]
ROUTERS = {  # tokens pick and experts pick: both ends of a routing
    "TokenChoiceTopKRouter": lambda: TokenChoiceTopKRouter(
        dim=D, num_experts=E, experts_per_token=2, gate_bias=True
    ),
    "ExpertChoiceTopKRouter": lambda: ExpertChoiceTopKRouter(
        dim=D, num_experts=E, capacity_factor=1.5
    ),
}


def layer_with(router, **changes):
    experts = GroupedExperts(dim=D, hidden_dim=H, num_experts=E, bias=True)
    return randomise(MoE(router=router, experts=experts, **changes)).double()


def losses_of(model, tokens, info):
    """Of language and of routing, as a step adds them up."""
    logits = model(tokens, info=info)
    labels = torch.where(info.mask.view_as(tokens), tokens, IGNORE_INDEX).roll(-1, 1)
    losses = router_losses(collect_routing(model), scope="sequence", num_tokens=info.mask.sum())
    return cross_entropy_sum(logits, labels), losses["balance"], losses["z"]


# Gradients reach everything, whatever is idle (RFC: writes through .data cut them; Automodel
# #2995: only an expert's first weight got one; NeMo: data parallelism searched for unused ones)


@pytest.mark.parametrize("score_position", POSITIONS)
@pytest.mark.parametrize("kind", ROUTERS)
def test_every_parameter_learns(kind, score_position):
    moe = layer_with(ROUTERS[kind](), score_position=score_position)
    x = torch.randn(40, D, dtype=torch.float64)
    moe(x, TokenInfo(input_ids=torch.arange(40))).square().sum().backward()
    routing = moe.last_routing
    assert (routing.num_tokens_per_expert > 0).all()
    for name, gradient in gradients(moe).items():
        assert gradient is not None, name
        assert gradient.flatten(1).any(-1).all() if gradient.ndim > 1 else gradient.any(), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_idle_experts_leave_no_parameter_of_a_model_without_a_gradient(checkpointing):
    model = decoder_of()
    model.activation_checkpointing = checkpointing
    for layer in (0, 2):  # one expert takes all first choices, another all second ones
        gate = model.layers[layer].mlp.router.gate
        with torch.no_grad():
            gate.weight.mul_(1e-3)
        gate.bias = torch.nn.Parameter(torch.tensor([50.0, 40, 0, 0]))
    tokens, info = batch()
    sum(losses_of(model, tokens, info)).backward()
    assert (layer_counts(collect_routing(model))[:, 2:] == 0).all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if ".experts." in name:
            assert parameter.grad[0].any(), name
            assert not parameter.grad[2:].any(), name


def test_the_balancing_loss_alone_reaches_every_router():
    """Automodel #1408: its gradient was thrown away."""
    model = decoder_of()
    losses_of(model, *batch())[1].backward()
    for layer in (0, 2):
        assert model.layers[layer].mlp.router.gate.weight.grad.abs().max() > 1e-6


@pytest.mark.parametrize("score_position", POSITIONS)
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "topk_sigmoid"])
def test_one_expert_a_token_with_normalised_weights_still_trains_the_router(
    score_function, score_position
):
    """Divided by itself a weight would be 1 for good."""
    router = TokenChoiceTopKRouter(
        dim=D, num_experts=E, experts_per_token=1, score_function=score_function,
        normalize_weights=True,
    )  # fmt: skip
    moe = layer_with(router, score_position=score_position)
    moe(torch.randn(40, D, dtype=torch.float64)).square().sum().backward()
    assert (moe.last_routing.weights != 1).all()
    assert router.gate.weight.grad.abs().max() > 1e-3


# Indices and shapes (RFC: a gather index not divided by k ran out of the tokens; scores were a row
# where a column was meant)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("kind", ROUTERS)
def test_shapes_and_ranges(kind, tokens, masked):
    router = randomise(ROUTERS[kind]())
    mask = torch.arange(tokens) % 3 != 1 if masked else None
    info = TokenInfo(mask=mask, input_ids=torch.arange(tokens))
    routing = router(torch.randn(tokens, D), info)
    check_routing(routing)
    (a,) = routing.token_index.shape
    assert routing.weights.shape == (a,)
    assert routing.logits.shape == routing.probs.shape == (tokens, E)
    assert routing.num_tokens_per_expert.shape == (E,)
    assert int(routing.token_index.min()) >= 0
    assert int(routing.token_index.max()) < tokens
    expert = expert_of_rows(routing.num_tokens_per_expert, a)
    assert (expert.diff() >= 0).all()
    if routing.slot_of is not None:
        assert routing.slot_of.shape[0] == tokens
        assert routing.slot_of.flatten().sort().values.tolist() == list(range(a))
    y = layer_with(ROUTERS[kind]())(torch.randn(tokens, D, dtype=torch.float64), info)
    assert y.shape == (tokens, D)


@pytest.mark.parametrize("k", [4, 32])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_a_router_of_1024_experts_in_groups(score_function, k):
    """As large as TransformerEngine tests its own, by sorting; within 4e-7 · e."""
    router = randomise(
        TokenChoiceTopKRouter(
            dim=16, num_experts=1024, experts_per_token=k, score_function=score_function,
            num_groups=8, groups_per_token=4, expert_bias=True,
        )
    ).double()  # fmt: skip
    router.expert_bias -= 2  # all below 0, so that a group masked with 0 would win
    x = torch.randn(300, 16, dtype=torch.float64)
    logits = x @ router.gate.weight.t()
    scores = logits.softmax(-1) if score_function == "softmax" else 1 / (1 + (-logits).exp())
    wish = scores + router.expert_bias
    groups = wish.view(300, 8, 128).sort(-1, descending=True).values[..., :2].sum(-1)
    rejected = groups.argsort(-1)[:, :4]
    wish = wish.view(300, 8, 128).clone()
    wish[torch.arange(300)[:, None], rejected] = -torch.inf
    chosen = wish.flatten(1).argsort(-1, descending=True)[:, :k]
    wanted = torch.zeros_like(scores).scatter(1, chosen, scores.gather(1, chosen))
    wanted = wanted / wanted.sum(-1, keepdim=True)
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 4e-7 * 1024)):
        got = dense_weights(router.to(dtype)(x.to(dtype), TokenInfo()))
        same = (got > 0) == (wanted > 0)
        assert same.all() if dtype == torch.float64 else same.all(-1).float().mean() > 0.99
        assert_near(got[same.all(-1)].double(), wanted[same.all(-1)], limit)


# Edges of the grouped product, through a whole layer (torch: expanded gradients, rows that are
# not multiples of 16 bytes and fp64 are refused by its kernel)


WIDTHS = pytest.mark.parametrize(("d", "h"), [(8, 12), (6, 5), (7, 4), (4, 3)])


@WIDTHS
@pytest.mark.parametrize("bias", [False, True])
def test_a_sum_over_what_experts_answer_at_any_width(d, h, bias):
    """The gradient of a sum is one number, expanded."""
    counts, found = torch.tensor([4, 0, 3, 2]), {}
    for dtype in (torch.float32, torch.float64):
        experts = GroupedExperts(dim=d, hidden_dim=h, num_experts=4, bias=bias)
        randomise(experts).to(dtype)
        x = torch.randn(11, d, generator=torch.Generator().manual_seed(0)).to(dtype)
        x.requires_grad_()
        experts(x, counts).sum().backward()
        found[dtype] = {"x": x.grad} | gradients(experts)
    for name, value in found[torch.float32].items():
        assert_near(value.double(), found[torch.float64][name], 1e-5, name)


@WIDTHS
@pytest.mark.parametrize("score_position", POSITIONS)
def test_layers_of_any_width(d, h, score_position):
    found = {}
    for dtype in (torch.float32, torch.float64):
        moe = moe_layer(
            embed_dim=d, expert_hidden_dim=h, num_experts=4, experts_per_token=2,
            score_position=score_position, expert_proj_bias=True,
        )  # fmt: skip
        randomise(moe).to(dtype)
        x = torch.randn(2, 9, d, generator=torch.Generator().manual_seed(0)).to(dtype)
        x.requires_grad_()
        y = moe(x)
        y.sum().backward()
        found[dtype] = {"y": y, "x": x.grad} | gradients(moe)
    for name, value in found[torch.float32].items():
        assert_near(value.double(), found[torch.float64][name], 1e-5, name)


@pytest.mark.parametrize("score_position", POSITIONS)
def test_the_layer_by_differences(score_position):
    moe = moe_of(score_position, shared="gated", bias=True)
    x = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    parameters = tuple(moe.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: moe(x), (x, *parameters))


# Padding (torchtitan #2765: NaN in rows that nobody filled)


@pytest.mark.parametrize("router", ["token", "expert"])
@pytest.mark.parametrize("score_position", POSITIONS)
def test_nan_in_padding_reaches_no_real_token_and_no_expert(router, score_position):
    moe = moe_of(score_position, bias=router == "token", router=router)
    x = torch.randn(12, D, dtype=torch.float64)
    mask = torch.arange(12) % 4 != 1
    found = []
    for padding in (0.0, float("nan")):
        filled = torch.where(mask[:, None], x, padding).requires_grad_()
        y = moe(filled, TokenInfo(mask=mask))
        assert not y[~mask].any()
        y.square().sum().backward()
        experts = {n: g for n, g in gradients(moe).items() if n.startswith("experts.")}
        found.append({"y": y.detach(), "x": filled.grad[mask]} | experts)
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name


# Counts and losses (Automodel #3247: a recomputed forward counted its load twice; NeMo and
# transformers: layers pooled before the loss, so that two collapses hid each other)


def test_a_recomputed_forward_counts_nothing_twice():
    model = decoder_of()
    model.activation_checkpointing = True
    tokens, info = batch()
    loss = sum(losses_of(model, tokens, info))
    last = collect_routing(model)
    before = layer_counts(last)
    assert before.sum(-1).tolist() == [2 * int(info.mask.sum())] * 2
    recomputed = []
    model.layers[0].mlp.router.register_forward_hook(lambda *_: recomputed.append(1))
    loss.backward()
    assert recomputed == [1]
    assert torch.equal(layer_counts(collect_routing(model)), before)
    assert all(routing is last[name] for name, routing in collect_routing(model).items())


def test_two_opposite_collapses_do_not_hide_each_other():
    model = decoder_of(num_layers=2, mlp=lambda _: layer_of_2())
    with torch.no_grad():
        for number, layer in enumerate(model.layers):
            layer.mlp.router.gate.weight.zero_()
            layer.mlp.router.gate.bias.copy_(torch.tensor([60.0, 0.0]).roll(number))
    tokens, info = batch()
    _, balance, _ = losses_of(model, tokens, info)
    counts = layer_counts(collect_routing(model))
    assert counts.sum(0).unique().numel() == 1, "pooled, the load looks even"
    assert_near(balance, torch.tensor(2.0), 1e-6)


def layer_of_2():
    return moe_layer(
        embed_dim=12, expert_hidden_dim=8, num_experts=2, experts_per_token=1, gate_bias=True
    )


# Coefficients are the recipe's (MagpieTTS: a layer that takes one would count it a second time)


@pytest.mark.parametrize("name", ["load_balancing_coef", "z_coef", "router_aux_loss_coef"])
@pytest.mark.parametrize(
    "build",
    [MoE, moe_layer, GroupedExperts, TokenChoiceTopKRouter, ExpertChoiceTopKRouter],
)
def test_no_module_takes_a_coefficient(build, name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        build(**{name: 0.01})
