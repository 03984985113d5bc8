"""Sinkhorn: marginals, load, gradients, documents, padding, extremes; softmax in evaluation."""

import pytest
import torch
from helpers import assert_near, quick, randomise
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moe_builders.errors import InputError
from moe_builders.experts import GroupedExperts
from moe_builders.moe import MoE
from moe_builders.routers import SinkhornRouter, TokenChoiceTopKRouter
from moe_builders.routers.replay import ReplaySlot
from moe_builders.routers.sinkhorn import balanced_log_probs
from moe_builders.routing import TokenInfo, check_routing, dense_weights

TIGHT = {"tolerance": 1e-11, "max_iterations": 500}


def skewed(t, e, dtype=torch.float32):
    """The logits on which softmax loads its favourite with twice the mean."""
    return 2 * torch.randn(t, e, dtype=dtype) + torch.linspace(0, 3, e, dtype=dtype)


def plain_plan(logits, rounds=500):
    """The same plan without logarithms: rows and columns of exp(logits) scaled in turn."""
    t, e = logits.shape
    kernel = logits.exp()
    columns = torch.ones(e, dtype=logits.dtype)
    for _ in range(rounds):
        rows = 1 / (t * (kernel @ columns))
        columns = 1 / (e * (kernel.t() @ rows))
    plan = rows[:, None] * kernel * columns
    return plan / plan.sum(-1, keepdim=True)


def router_of(dtype=torch.float32, **changes):
    arguments = {"dim": 6, "num_experts": 4, "experts_per_token": 2} | changes
    return randomise(SinkhornRouter(**arguments)).to(dtype)


def passing(e, **changes):
    """A router whose logits are its input."""
    router = SinkhornRouter(dim=e, num_experts=e, experts_per_token=2, **changes)
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(e))
    return router


def worst_load(routing):
    counts = routing.num_tokens_per_expert.double()
    return float(counts.max() / counts.mean())


@pytest.mark.parametrize(("e", "t", "limit", "plain"), [(8, 2048, 1.10, 1.8), (64, 4096, 1.2, 3)])
@pytest.mark.parametrize("select_only", [False, True])
def test_the_hard_load_is_even(e, t, limit, plain, select_only):
    x = skewed(t, e)
    router = passing(e, select_only=select_only)
    routing = router(x, TokenInfo())
    check_routing(routing)
    assert worst_load(routing) <= limit
    assert worst_load(router.eval()(x, TokenInfo())) > plain


@pytest.mark.parametrize("tolerance", [0.1, 0.01, 1e-4])
def test_marginals_are_within_the_tolerance_and_no_further(tolerance):
    logits = skewed(512, 8, torch.float64)
    probs = balanced_log_probs(logits, tolerance=tolerance, max_iterations=100).exp()
    assert_near(probs.sum(-1), torch.ones(512, dtype=torch.float64), 1e-12)
    error = (8 * probs.mean(0) - 1).abs().max()
    assert tolerance / 20 < error < tolerance  # it stops as soon as it is good enough


def test_the_number_of_corrections_is_limited():
    logits = skewed(512, 8, torch.float64)
    u = torch.log(torch.tensor(1 / 512)) - logits.logsumexp(1)  # with v = 0
    v = torch.log(torch.tensor(1 / 8)) - (logits + u[:, None]).logsumexp(0)
    got = balanced_log_probs(logits, tolerance=1e-9, max_iterations=1).exp()
    assert_near(got, (logits + v).softmax(-1), 1e-7)


def test_equal_to_plain_scaling():
    logits = skewed(40, 5, torch.float64)
    got = balanced_log_probs(logits, **TIGHT).exp()
    assert_near(got, plain_plan(logits), 1e-9)


def test_training_picks_and_weighs_by_the_plan():
    router = router_of(torch.float64, **TIGHT)
    x = torch.randn(20, 6, dtype=torch.float64)
    routing = router(x, TokenInfo())
    plan = plain_plan(x @ router.gate.weight.t().detach())
    assert_near(routing.probs, plan, 1e-9)
    assert_near(routing.logits, x @ router.gate.weight.t(), 1e-12)
    best = plan.topk(2).indices
    weights = plan.gather(1, best)
    wanted = torch.zeros_like(plan).scatter(1, best, weights / weights.sum(-1, keepdim=True))
    assert_near(dense_weights(routing), wanted, 1e-9)
    router.normalize_weights = False
    wanted = torch.zeros_like(plan).scatter(1, best, weights)
    assert_near(dense_weights(router(x, TokenInfo())), wanted, 1e-9)


def test_select_only_weighs_by_the_softmax():
    router = router_of(torch.float64, select_only=True, **TIGHT)
    x = torch.randn(20, 6, dtype=torch.float64)
    routing = router(x, TokenInfo())
    logits = x @ router.gate.weight.t()
    best, probs = plain_plan(logits.detach()).topk(2).indices, logits.softmax(-1)
    assert not torch.equal(best.sort().values, probs.topk(2).indices.sort().values)
    weights = probs.gather(1, best)
    wanted = torch.zeros_like(probs).scatter(1, best, weights / weights.sum(-1, keepdim=True))
    assert_near(dense_weights(routing), wanted, 1e-10)
    assert_near(routing.probs, probs, 1e-12)
    probe = torch.randn_like(wanted)
    (got,) = torch.autograd.grad((dense_weights(routing) * probe).sum(), router.gate.weight)
    (hand,) = torch.autograd.grad((wanted * probe).sum(), router.gate.weight)
    assert_near(got, hand, 1e-10)


@pytest.mark.parametrize("select_only", [False, True])
def test_evaluation_is_token_choice(select_only):
    router = router_of(select_only=select_only, jitter="gumbel", jitter_scale=1.0).eval()
    plain = TokenChoiceTopKRouter(dim=6, num_experts=4, experts_per_token=2)
    plain.load_state_dict(router.state_dict())
    x = torch.randn(20, 6)
    mask = torch.arange(20) % 3 != 0
    got, wanted = (r(x, TokenInfo(mask=mask)) for r in (router, plain))
    assert_near(dense_weights(got), dense_weights(wanted), 1e-6)
    assert_near(got.probs[mask], wanted.probs[mask], 1e-6)


def test_what_it_says_of_itself():
    router = router_of()
    assert router.balances_itself
    assert router.experts_per_token == 2
    x = torch.randn(20, 6)
    for training in (True, False):
        router.train(training)
        whole = router(x, TokenInfo()).probs[:12]
        same = torch.equal(router(x[:12], TokenInfo()).probs, whole)
        assert router.causal is same is not training


@pytest.mark.parametrize("iterations", [1, 4, 60])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_gradient_through_the_iterations(iterations, documents, masked):
    logits = skewed(9, 3, torch.float64).requires_grad_()
    mask = torch.arange(9) != 4 if masked else None
    sequence_ids = torch.tensor([0, 0, 0, 0, 5, 5, 5, 5, 5]) if documents else None

    def plan(z):
        return balanced_log_probs(
            z,
            mask=mask,
            sequence_ids=sequence_ids,
            tolerance=1e-5,
            max_iterations=iterations,
        ).exp()

    assert torch.autograd.gradcheck(plan, (logits,), rtol=1e-4)


def test_the_gradient_knows_that_columns_stay_even():
    """What shifts a whole column changes no plan; a softmax's gradient would see it."""
    logits = skewed(50, 4, torch.float64).requires_grad_()
    plan = balanced_log_probs(logits, **TIGHT).exp()
    (grad,) = torch.autograd.grad((plan * torch.randn_like(plan)).sum(), logits)
    assert grad.abs().max() > 1e-3
    assert grad.sum(0).abs().max() < 1e-8


@pytest.mark.parametrize("documents", [False, True])
def test_computing_on_after_convergence_changes_no_bit(documents, monkeypatch):
    """On an accelerator nobody asks whether it is enough: all iterations run, results frozen."""
    ids = torch.arange(3).repeat_interleave(20) if documents else None
    values, probe = skewed(60, 4), torch.randn(60, 4)

    def run():
        logits = values.clone().requires_grad_()
        got = balanced_log_probs(logits, sequence_ids=ids, tolerance=0.01, max_iterations=40).exp()
        (grad,) = torch.autograd.grad((got * probe).sum(), logits)
        return got, grad, _length(got.grad_fn)

    early = run()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # nobody may ask
    late = run()
    assert late[2] > 2 * early[2], "all iterations were computed"
    assert torch.equal(early[0], late[0])
    assert torch.equal(early[1], late[1])


def _length(node):
    """How many steps backward takes at most."""
    seen, todo = set(), [node]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return len(seen)


@pytest.mark.parametrize("select_only", [False, True])
def test_what_is_kept_for_backward(select_only):
    """Selecting alone keeps nothing of the iterations."""
    kept = []
    for iterations in (2, 12):
        router = router_of(select_only=select_only, max_iterations=iterations, tolerance=1e-9)
        count = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, c=count: c.append(x) or x, lambda x: x
        ):
            router(torch.randn(20, 6), TokenInfo())
        kept.append(len(count))
    assert (kept[0] == kept[1]) is select_only


def test_no_value_is_read_on_the_host():
    """A tensor without content would refuse; on the meta device all iterations run, too."""
    router = router_of(per_sequence=True).to("meta")
    x = torch.empty(12, 6, device="meta")
    info = TokenInfo(
        mask=torch.empty(12, dtype=torch.bool, device="meta"),
        sequence_ids=torch.empty(12, dtype=torch.int64, device="meta"),
    )
    assert router(x, info).probs.shape == (12, 4)


@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("select_only", [False, True])
def test_masked_tokens_change_nothing_and_may_hold_nan(per_sequence, select_only):
    router = router_of(per_sequence=per_sequence, select_only=select_only)
    mask = torch.arange(30) % 4 != 1
    ids = torch.arange(3).repeat_interleave(10)
    x = torch.randn(30, 6)
    x[~mask] = float("nan")
    x.requires_grad_()
    routing = router(x, TokenInfo(mask=mask, sequence_ids=ids))
    check_routing(routing)
    alone = router(x[mask], TokenInfo(sequence_ids=ids[mask]))
    assert_near(routing.probs[mask], alone.probs, 1e-5)
    assert_near(dense_weights(routing)[mask], dense_weights(alone), 1e-5)
    for tensor in (routing.logits, routing.probs, dense_weights(routing)):
        assert (tensor[~mask] == 0).all()
    routing.weights.square().sum().backward()
    assert router.gate.weight.grad.isfinite().all()
    assert router.gate.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("per_sequence", [False, True])
def test_a_batch_of_padding_alone(per_sequence):
    router = router_of(per_sequence=per_sequence)
    x = torch.full((6, 6), float("nan"))
    ids = torch.zeros(6, dtype=torch.int64)
    routing = router(x, TokenInfo(mask=torch.zeros(6, dtype=torch.bool), sequence_ids=ids))
    check_routing(routing)
    assert routing.num_tokens_per_expert.sum() == 0
    assert (routing.weights == 0).all()
    assert (routing.probs == 0).all()
    (routing.weights.sum() + routing.probs.sum()).backward()
    assert (router.gate.weight.grad == 0).all()


def test_each_document_by_itself():
    router = router_of(torch.float64, per_sequence=True, **TIGHT)
    ids = torch.tensor([7] * 9 + [2] * 12 + [7] * 4)  # in two pieces, and in no order
    x = torch.randn(25, 6, dtype=torch.float64)
    routing = router(x, TokenInfo(sequence_ids=ids))
    check_routing(routing)
    for number in (2, 7):
        own = routing.probs[ids == number]
        assert_near(own.mean(0), torch.full((4,), 0.25, dtype=torch.float64), 1e-10)
        alone = router(x[ids == number], TokenInfo())
        assert_near(own, alone.probs, 1e-9)
    changed = x.clone()
    changed[ids == 2] += 1
    after = router(changed, TokenInfo(sequence_ids=ids))
    assert torch.equal(after.probs[ids == 7], routing.probs[ids == 7])
    together = SinkhornRouter(dim=6, num_experts=4, experts_per_token=2, **TIGHT).double()
    together.load_state_dict(router.state_dict())
    assert_near(
        together(x, TokenInfo(sequence_ids=ids)).probs, together(x, TokenInfo()).probs, 1e-12
    )


@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("kind", ["column", "noise", "equal", "one"])
def test_extreme_logits_stay_finite(per_sequence, kind):
    logits = {
        "column": torch.tensor([1e4, -1e4, 0.0, 1.0]).repeat(32, 1),
        "noise": (torch.rand(32, 4) * 2 - 1) * 1e4,
        "equal": torch.full((32, 4), -1e4),
        "one": torch.where(torch.arange(4) == 2, 1e4, -1e4).repeat(32, 1),
    }[kind].requires_grad_()
    ids = torch.arange(2).repeat_interleave(16) if per_sequence else None
    probs = balanced_log_probs(
        logits, sequence_ids=ids, tolerance=0.01, max_iterations=30
    ).exp()  # fmt: skip
    assert_near(probs.sum(-1), torch.ones(32), 1e-6)
    (probs * torch.randn(32, 4)).sum().backward()
    assert logits.grad.isfinite().all()
    if kind != "noise":  # any constant on a column is undone at once
        assert_near(probs.detach(), torch.full((32, 4), 0.25), 0.02)


@quick
@given(
    t=st.integers(1, 20),
    seed=st.integers(0, 9),
    shift=st.floats(-50, 50),
    masked=st.booleans(),
    per_sequence=st.booleans(),
)
def test_a_constant_on_a_row_or_a_column_changes_nothing(t, seed, shift, masked, per_sequence):
    stream = torch.Generator().manual_seed(seed)
    logits = torch.randn(t, 4, dtype=torch.float64, generator=stream)
    mask = torch.rand(t, generator=stream) > 0.3 if masked else None
    ids = torch.randint(0, t, (t,), generator=stream) if per_sequence else None
    arguments = {"mask": mask, "sequence_ids": ids, "tolerance": 1e-9, "max_iterations": 2000}
    probs = balanced_log_probs(logits, **arguments).exp()
    moved = logits + shift * torch.randn(t, 1, dtype=torch.float64, generator=stream)
    moved = moved + shift * torch.randn(4, dtype=torch.float64, generator=stream)
    real = torch.ones(t, dtype=torch.bool) if mask is None else mask
    document = torch.zeros(t, dtype=torch.int64) if ids is None else ids
    together = document[:, None] == document
    real = real & ((together & real).sum(-1) > 1)  # one that is alone is not balanced
    if real.any():
        assert_near(balanced_log_probs(moved, **arguments).exp()[real], probs[real], 1e-7)


def test_bf16_tokens_are_routed_in_fp32():
    router = router_of().bfloat16()
    routing = router(torch.randn(10, 6).bfloat16(), TokenInfo())
    assert routing.weights.dtype == routing.probs.dtype == torch.float32
    assert_near(routing.probs.mean(0), torch.full((4,), 0.25), 0.02)


def test_one_expert_per_token_keeps_its_weight_and_its_gradient():
    router = router_of(experts_per_token=1)
    routing = router(torch.randn(10, 6), TokenInfo())
    assert (routing.weights < 0.99).any()
    routing.weights.sum().backward()
    assert router.gate.weight.grad.abs().max() > 1e-4


def test_the_gates_bias_only_counts_in_evaluation():
    fresh = SinkhornRouter(dim=6, num_experts=4, experts_per_token=2, gate_bias=True)
    assert (fresh.gate.bias == 0).all(), "no expert is preferred"
    router = router_of(torch.float64, gate_bias=True, **TIGHT)
    x = torch.randn(20, 6, dtype=torch.float64)
    seen = []
    for bias in (0.0, 3.0):
        with torch.no_grad():
            router.gate.bias.copy_(bias * torch.arange(4))
        seen.append([router.train(mode)(x, TokenInfo()).probs for mode in (True, False)])
    assert_near(seen[0][0], seen[1][0], 1e-9)
    assert (seen[0][1] - seen[1][1]).abs().max() > 0.1


def test_noise_in_training_only_and_not_in_the_logits_of_the_z_loss():
    router = router_of(jitter="gumbel", jitter_scale=1.0)
    x = torch.randn(20, 6)
    clean = x @ router.gate.weight.t()
    first, second = router(x, TokenInfo()), router(x, TokenInfo())
    assert not torch.equal(first.probs, second.probs)
    assert_near(first.logits, clean, 1e-6)
    router.eval()
    assert_near(router(x, TokenInfo()).probs, clean.softmax(-1), 1e-6)


def test_a_selection_can_be_replayed():
    router = router_of()
    assert isinstance(router.replay, ReplaySlot)
    wanted = torch.tensor([[3, 1]]).repeat(10, 1)
    router.replay = lambda expert: wanted
    routing = router(torch.randn(10, 6), TokenInfo())
    check_routing(routing)
    assert torch.equal(routing.selected, wanted)
    got = routing.weights[routing.slot_of]
    own = routing.probs.gather(1, wanted)
    assert_near(got, own / own.sum(-1, keepdim=True), 1e-6)


@pytest.mark.parametrize("per_sequence", [False, True])
def test_compiles_into_one_graph(per_sequence):
    torch._dynamo.reset()
    experts = GroupedExperts(dim=6, hidden_dim=5, num_experts=4)
    router = router_of(per_sequence=per_sequence, max_iterations=3)
    layer = randomise(MoE(router=router, experts=experts))
    x = torch.randn(24, 6)
    info = TokenInfo(mask=torch.arange(24) < 20, sequence_ids=torch.arange(24) // 8)
    graph = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_near(graph(x, info), layer(x, info), 1e-5)


def test_precision_of_the_gate():
    router = router_of(gate_precision="bf16")
    x = torch.randn(20, 6)
    rounded = nn.functional.linear(x.bfloat16(), router.gate.weight.bfloat16()).float()
    assert torch.equal(router(x, TokenInfo()).logits, rounded)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_per_token": 0}, "experts_per_token is 0"),
        ({"experts_per_token": 5}, r"experts_per_token is 5.*num_experts \(4\)"),
        ({"tolerance": 0.0}, "tolerance is 0.0"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
        ({"max_iterations": 0}, "max_iterations is 0"),
        ({"jitter_scale": 0.1}, "jitter is not set"),
        ({"jitter": "uniform", "jitter_scale": 0.1}, "'uniform' is not one of"),
        ({"gate_precision": "fp8"}, "'fp8' is not one of"),
    ],
)
def test_numbers_out_of_range(changes, message):
    with pytest.raises(InputError, match=message):
        router_of(**changes)


def test_a_document_of_one_token_is_routed_by_its_own_scores():
    """Its plan would be 1/e for every expert, and rounding would choose."""
    torch.manual_seed(0)
    router = SinkhornRouter(dim=6, num_experts=8, experts_per_token=2, per_sequence=True).double()
    x = torch.randn(9, 6, dtype=torch.float64)
    ids = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3])
    routing = router(x, TokenInfo(sequence_ids=ids))
    for alone in (3, 8):
        wanted = router.gate(x[alone]).softmax(-1).topk(2)
        assert routing.selected[alone].tolist() == wanted.indices.tolist()
        torch.testing.assert_close(routing.probs[alone], router.gate(x[alone]).softmax(-1))
