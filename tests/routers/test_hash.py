"""Hash routing: experts by vocabulary id, learned weights, tables, and where ids come from."""

from dataclasses import replace

import pytest
import torch
from helpers import assert_near, quick, randomise
from helpers_decoder import D, V, batch, decoder_of
from hypothesis import given
from hypothesis import strategies as st

from moe_builders.data.batch import collate
from moe_builders.errors import InputError
from moe_builders.experts import GroupedExperts
from moe_builders.moe import MoE, collect_routing
from moe_builders.routers import HashRouter
from moe_builders.routers.replay import ReplaySlot
from moe_builders.routing import TokenInfo, check_routing, dense_weights

TABLE = [[0, 3], [3, 1], [2, 0], [1, 2], [1, 0]]


def router_of(**changes):
    arguments = {"dim": 6, "num_experts": 4, "experts_per_token": 2} | changes
    return randomise(HashRouter(**arguments))


def ids_of(*ids):
    return TokenInfo(input_ids=torch.tensor(ids))


def test_the_default_table():
    router = router_of(num_experts=5, experts_per_token=3)
    routing = router(torch.randn(4, 6), ids_of(0, 1, 2, 100_000))
    check_routing(routing)
    # (3 · id + j) mod 5
    assert routing.selected.tolist() == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [0, 1, 2]]
    assert list(router.state_dict()) == ["gate.weight"]


@pytest.mark.parametrize("kind", ["lists", "tensor"])
def test_a_given_table(kind):
    table = TABLE if kind == "lists" else torch.tensor(TABLE, dtype=torch.int32)
    router = router_of(table=table, vocab_size=5)
    routing = router(torch.randn(4, 6), ids_of(4, 0, 0, 2))
    check_routing(routing)
    assert routing.selected.tolist() == [[1, 0], [0, 3], [0, 3], [2, 0]]
    assert router.state_dict()["table"].dtype == torch.int64
    other = router_of(table=[[0, 1]] * 5)
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.table, torch.tensor(TABLE))


def test_a_table_where_models_are_built_without_memory():
    with torch.device("meta"):
        router = router_of(table=TABLE)
    assert router.table.is_meta
    assert router.table.shape == (5, 2)
    with torch.device("meta"), pytest.raises(InputError, match="row 0 is"):
        router_of(table=[[0, 0]])


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("normalize", [None, True, False])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_weights(score_function, normalize, scale):
    router = router_of(
        score_function=score_function, normalize_weights=normalize, route_scale=scale
    ).double()
    x = torch.randn(9, 6, dtype=torch.float64)
    ids = torch.arange(9) * 7
    routing = router(x, TokenInfo(input_ids=ids))
    check_routing(routing)
    logits = x @ router.gate.weight.t()
    scores = {
        "softmax": logits.softmax(-1),
        "sigmoid": 1 / (1 + (-logits).exp()),
        "sqrtsoftplus": (1 + logits.exp()).log().sqrt(),
    }[score_function]
    divide = score_function != "softmax" if normalize is None else normalize
    wanted = torch.zeros_like(scores)
    for i, token in enumerate(ids.tolist()):
        experts = [(token * 2 + j) % 4 for j in range(2)]
        total = scores[i, experts].sum() if divide else 1
        for j in experts:
            wanted[i, j] = scale * scores[i, j] / total
    assert_near(dense_weights(routing), wanted, 1e-12)
    assert_near(routing.probs, scores / scores.sum(-1, keepdim=True), 1e-12)
    probe = torch.randn_like(wanted)
    (got,) = torch.autograd.grad((dense_weights(routing) * probe).sum(), router.gate.weight)
    (hand,) = torch.autograd.grad((wanted * probe).sum(), router.gate.weight)
    assert_near(got, hand, 1e-10)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("level", [-1e4, -300.0, 1e4])
def test_logits_far_out(score_function, level):
    router = router_of(score_function=score_function)
    with torch.no_grad():
        router.gate.weight.copy_(level * torch.ones(4, 6))
        router.gate.weight[1] += 0.5
    x = torch.eye(6)[:3]
    routing = router(x, ids_of(0, 1, 2))
    check_routing(routing)
    routing.weights.square().sum().backward()
    assert router.gate.weight.grad.isfinite().all()
    if score_function != "softmax":  # normalised: the difference still counts
        assert_near(routing.weights[routing.slot_of].sum(-1), torch.ones(3), 1e-6)


def test_one_expert_per_token_keeps_its_weight_and_its_gradient():
    for score_function in ("softmax", "sigmoid", "sqrtsoftplus"):
        router = router_of(
            experts_per_token=1, score_function=score_function, normalize_weights=True
        )
        routing = router(torch.randn(5, 6), ids_of(0, 1, 2, 3, 4))
        assert (routing.weights - 1).abs().min() > 1e-3
        routing.weights.sum().backward()
        assert router.gate.weight.grad.abs().max() > 1e-3


@quick
@given(
    e=st.integers(1, 9),
    k=st.integers(1, 9),
    ids=st.lists(st.integers(0, 2**40), min_size=1, max_size=12),
)
def test_each_token_gets_k_distinct_experts(e, k, ids):
    k = min(k, e)
    router = router_of(num_experts=e, experts_per_token=k)
    routing = router(torch.randn(len(ids), 6), ids_of(*ids))
    check_routing(routing)
    assert all(len(set(row)) == k for row in routing.selected.tolist())
    assert routing.num_tokens_per_expert.sum() == len(ids) * k


def test_padding_may_hold_any_id():
    mask = torch.tensor([True, False, True, False])
    for table in (None, TABLE):
        router = router_of(table=table)
        x = torch.randn(4, 6)
        routing = router(x, replace(ids_of(3, -100, 1, 10**9), mask=mask))
        check_routing(routing)
        alone = router(x[mask], ids_of(3, 1))
        assert torch.equal(routing.selected[mask], alone.selected)
        assert torch.equal(dense_weights(routing)[mask], dense_weights(alone))
        assert (dense_weights(routing)[~mask] == 0).all()


def test_causal():
    router = router_of()
    assert router.causal
    x, info = torch.randn(8, 6), ids_of(*range(8))
    short = router(x[:5], ids_of(*range(5)))
    assert torch.equal(dense_weights(router(x, info))[:5], dense_weights(short))


def test_bf16_tokens_are_routed_in_fp32():
    router = router_of().bfloat16()
    routing = router(torch.randn(3, 6).bfloat16(), ids_of(0, 1, 2))
    assert routing.weights.dtype == routing.probs.dtype == torch.float32


def test_a_selection_can_be_replayed():
    router = router_of()
    assert isinstance(router.replay, ReplaySlot)
    wanted = torch.tensor([[3, 1]]).repeat(3, 1)
    router.replay = lambda expert: wanted
    assert torch.equal(router(torch.randn(3, 6), ids_of(0, 1, 2)).selected, wanted)


def hash_layer(layer=0):
    experts = GroupedExperts(dim=D, hidden_dim=8, num_experts=4)
    return MoE(
        router=HashRouter(dim=D, num_experts=4, experts_per_token=2, vocab_size=V),
        experts=experts,
    )


@pytest.mark.parametrize("given_info", ["none", "whole", "without ids"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_decoder_hands_ids_on(given_info, checkpointing):
    model = decoder_of(mlp=hash_layer)
    model.activation_checkpointing = checkpointing
    tokens, info = batch()
    if given_info == "none":
        info = None
    elif given_info == "without ids":
        info = replace(info, input_ids=None)
    model(tokens, info=info).square().sum().backward()
    flat = tokens.flatten()
    wanted = torch.stack([flat * 2 % 4, (flat * 2 + 1) % 4], 1)
    for routing in collect_routing(model).values():
        real = slice(None) if info is None else info.mask
        assert torch.equal(routing.selected[real], wanted[real])
    assert all(layer.mlp.router.gate.weight.grad.abs().max() > 0 for layer in model.layers)


def test_a_batch_hands_ids_on():
    samples = [
        {"tokens": [5, 6, 7], "labels": [6, 7, -100], "lengths": [3]},
        {"tokens": [9], "labels": [-100], "lengths": [1]},
    ]
    made = collate(samples, pad_id=0)
    model = decoder_of(mlp=hash_layer)
    model(made.tokens, input_pos=made.positions, info=made.info)
    for routing in collect_routing(model).values():
        check_routing(routing)
        assert routing.selected[:4, 0].tolist() == [2, 0, 2, 2]  # 2 · id mod 4
        assert routing.num_tokens_per_expert.sum() == 8


def test_compiles_into_one_graph():
    torch._dynamo.reset()
    layer = randomise(hash_layer())
    x, info = torch.randn(6, D), ids_of(*range(6))
    graph = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_near(graph(x, info), layer(x, info), 1e-6)


def test_without_ids_it_says_who_provides_them():
    with pytest.raises(InputError, match=r"MoEDecoder provides.*TokenInfo\(input_ids=...\)"):
        hash_layer()(torch.randn(3, D))
    with pytest.raises(InputError, match=r"shape \[2\], but there are 3 tokens"):
        hash_layer()(torch.randn(3, D), ids_of(1, 2))


def test_root_of_softplus_at_any_level():
    """Through its logarithm, on both sides of the border where it changes."""
    router = router_of(num_experts=2, experts_per_token=1, score_function="sqrtsoftplus").double()
    z = torch.linspace(-60, 60, 121, dtype=torch.float64)
    with torch.no_grad():
        router.gate.weight.zero_()[:, 0] = 1
    x = torch.zeros(121, 6, dtype=torch.float64)
    x[:, 0] = z
    routing = router(x, TokenInfo(input_ids=torch.arange(121)))
    wanted = z.exp().log1p().sqrt()  # softplus in torch is linear from 20 on
    assert ((routing.weights[routing.slot_of[:, 0]] - wanted) / wanted).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_per_token": 0}, "experts_per_token is 0"),
        ({"experts_per_token": 5}, r"experts_per_token is 5.*num_experts \(4\)"),
        ({"score_function": "relu"}, "'relu' is not one of softmax, sigmoid, sqrtsoftplus"),
        ({"table": [[0, 1], [2, 4]]}, r"row 1 is \[2, 4\], but experts are numbered 0 to 3"),
        ({"table": [[0, -1]]}, r"row 0 is \[0, -1\]"),
        ({"table": [[0, 1], [3, 3]]}, r"row 1 is \[3, 3\], .* must be distinct"),
        ({"table": [[0, 1, 2]]}, r"\[1, 3\] of torch.int64, but must be \[v, 2\]"),
        ({"table": [0, 1]}, r"must be \[v, 2\]"),
        ({"table": []}, r"must be \[v, 2\]"),
        ({"table": [[0.0, 1.0]]}, "torch.float32"),
        ({"table": [[0, 1], [2]]}, "whole numbers, a list of rows: expected sequence of length 2"),
        ({"table": "t.pt"}, "table is 't.pt', but must be"),
        ({"table": TABLE, "vocab_size": 6}, "5 rows, but vocab_size is 6"),
    ],
)
def test_numbers_out_of_range(changes, message):
    with pytest.raises(InputError, match=message):
        router_of(**changes)
