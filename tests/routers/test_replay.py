"""Router replay: the same selection again, with the weights and gradients of now."""

import copy

import pytest
import torch
from helpers import assert_near, gradients, randomise
from helpers_decoder import batch, decoder_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_builders.errors import InputError
from moe_builders.moe import collect_routing, moe_layer
from moe_builders.routers import TokenChoiceTopKRouter
from moe_builders.routers.replay import RouterReplay
from moe_builders.routing import TokenInfo


class Stack(nn.Module):
    """Two layers with experts, one without."""

    def __init__(self):
        super().__init__()
        self.first, self.dense = self.experts(), nn.Linear(6, 6)
        self.last = self.experts()
        randomise(self)

    @staticmethod
    def experts():
        return moe_layer(
            embed_dim=6, expert_hidden_dim=4, num_experts=8, experts_per_token=3,
            score_function="sigmoid", expert_bias=True,
        )  # fmt: skip

    def forward(self, x):
        return self.last(x + self.dense(self.first(x)))


def changed(model, seed=7):
    """Another router on the same experts."""
    other = Stack()
    other.load_state_dict(model.state_dict())
    for moe in (other.first, other.last):
        randomise(moe.router, seed)
    return other


def test_only_the_selection_is_replayed():
    model, x = Stack(), torch.randn(20, 6)
    replay = RouterReplay(model)
    with replay.record():
        y = model(x)
    recorded = replay.collect()
    assert [tuple(r.shape) for r in recorded] == [(20, 3)] * 2
    assert torch.equal(recorded[0], collect_routing(model)["first"].selected)
    assert torch.equal(recorded[1], collect_routing(model)["last"].selected)
    with replay.replay(recorded):
        assert torch.equal(model(x), y)

    other = changed(model)
    other(x)
    assert not torch.equal(other.first.last_routing.selected, recorded[0])
    with RouterReplay(other).replay(recorded):
        other(x)
    for moe, wanted in ((other.first, recorded[0]), (other.last, recorded[1])):
        routing = moe.last_routing
        assert torch.equal(routing.selected, wanted)
        scores = routing.logits.sigmoid().gather(1, wanted)
        assert_near(routing.weights[routing.slot_of], scores / scores.sum(-1, keepdim=True), 1e-6)


def test_the_router_learns_and_idle_slots_change_nothing():
    model, x = Stack(), torch.randn(20, 6)
    replay = RouterReplay(model)
    with replay.record():
        model(x)
    other = changed(model)
    with RouterReplay(other).replay(replay.collect()):
        other(x).square().sum().backward()
    assert other.first.router.gate.weight.grad.abs().sum() > 0
    again = changed(model)
    assert torch.equal(again(x), changed(model)(x))
    y = other(x)
    assert torch.equal(y, again(x))  # after the replay the router is free again
    assert not torch.equal(other.first.last_routing.selected, replay.collect()[0])


def test_what_was_recorded_is_replayed_without_being_given():
    model, x = Stack(), torch.randn(20, 6)
    replay = RouterReplay(model)
    with replay.record():
        model(torch.randn(9, 6))
        model(x)  # of several forwards, the last one's
    recorded = replay.collect()
    assert recorded[0].shape == (20, 3)
    for moe in (model.first, model.last):
        randomise(moe.router, 7)
    with replay.replay():
        model(x)
    assert torch.equal(model.first.last_routing.selected, recorded[0])
    replay.clear()
    with pytest.raises(RuntimeError, match=r"first\.router has recorded nothing: run a forward"):
        replay.collect()


def decoder(checkpointing):
    model = decoder_of()
    model.activation_checkpointing = checkpointing
    return model


def test_recomputation_sees_the_same_targets():
    tokens = batch()[0]
    found = []
    for checkpointing in (False, True):
        model = decoder(checkpointing)
        replay = RouterReplay(model)
        with replay.record():
            model(tokens).square().sum().backward()
            recorded = replay.collect()
        assert [r.shape for r in recorded] == [(20, 2)] * 2
        targets = [(r + 1) % 4 for r in recorded]
        gradients(model)
        with replay.replay(targets):
            model(tokens).square().sum().backward()
        found.append(gradients(model))
    for name, wanted in found[0].items():
        assert torch.equal(found[1][name], wanted), name


def test_the_decoders_recomputation_replays_after_the_replay_too():
    """It takes over what the forward decided, and so what was replayed."""
    tokens, found = batch()[0], []
    for checkpointing in (False, True):
        model = decoder(checkpointing)
        replay = RouterReplay(model)
        with replay.record():
            model(tokens)
        with replay.replay([(r + 1) % 4 for r in replay.collect()]):
            loss = model(tokens).sum()
        loss.backward()
        found.append(gradients(model))
    for name, wanted in found[0].items():
        assert torch.equal(found[1][name], wanted), name


def test_a_recomputation_that_keeps_no_decisions_is_refused_after_the_replay():
    """It would select anew, and give gradients of another forward without a word."""
    model, x = Stack(), torch.randn(20, 6, requires_grad=True)
    replay = RouterReplay(model)
    with replay.record():
        model(x)
    with replay.replay([(r + 1) % 8 for r in replay.collect()]):
        loss = checkpoint(model, x, use_reentrant=False).sum()
    with pytest.raises(RuntimeError, match=r"call backward inside `with replay\.replay"):
        loss.backward()
    model(x).sum().backward()  # ordinary training goes on


def test_copies_do_not_share_slots():
    model, x = Stack(), torch.randn(20, 6)
    replay = RouterReplay(model)
    with replay.record(), torch.no_grad():
        model(x)
        twin = copy.deepcopy(model)
        twin(torch.randn(5, 6))
    assert replay.collect()[0].shape == (20, 3)
    with pytest.raises(RuntimeError, match="has recorded nothing"):
        RouterReplay(twin).collect()
    with replay.replay():
        twin(torch.randn(4, 6))  # it is not bound to the 20 tokens
    copies = decoder_of(mlp=Stack.experts())
    slots = [layer.mlp.router.replay for layer in copies.layers]
    assert slots[0] is not slots[1]


def test_masked_tokens_stay_masked():
    router, mask = randomise(Stack.experts()).router, torch.arange(10) % 3 > 0
    replay = RouterReplay(router)
    with replay.record():
        router(torch.randn(10, 6), TokenInfo(mask=mask))
    with replay.replay():
        routing = router(torch.randn(10, 6), TokenInfo(mask=mask))
    assert int(routing.num_tokens_per_expert.sum()) == 3 * int(mask.sum())


def selection(t=20, k=3):
    return torch.arange(k).expand(t, k).contiguous()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([selection()], "there are 1 selections to replay, but 2 routers"),
        ([selection(), selection()[0]], r"last.router is \[3\] torch.int64, but must be \[t, k\]"),
        ([selection(), selection().float()], r"is \[20, 3\] torch.float32, but must be"),
        ([selection(), selection() + 6], "names expert 8, but its experts are 0 to 7"),
        ([selection() - 1, selection()], r"first.router names expert -1, but"),
        ([selection(), selection() * 0], "last.router gives a token an expert twice"),
    ],
)  # fmt: skip
def test_targets_that_are_none(targets, message):
    with pytest.raises(InputError, match=message), RouterReplay(Stack()).replay(targets):
        raise AssertionError


@pytest.mark.parametrize("shape", [(19, 3), (20, 2)])
def test_another_shape(shape):
    model = Stack()
    with (
        RouterReplay(model).replay([selection(*shape)] * 2),
        pytest.raises(InputError, match=rf"\[{shape[0]}, {shape[1]}\], .* selects \[20, 3\]"),
    ):
        model(torch.randn(20, 6))


def test_nothing_to_replay():
    model = Stack()
    replay = RouterReplay(model)
    with pytest.raises(RuntimeError, match="has recorded nothing"), replay.replay():
        raise AssertionError
    with replay.replay([selection()] * 2):
        replay.clear()
        with pytest.raises(RuntimeError, match="is to replay, but has no target"):
            model(torch.randn(20, 6))
    with pytest.raises(InputError, match="no router whose selection could be replayed"):
        RouterReplay(nn.Linear(2, 2))
    with (
        replay.record(),
        pytest.raises(RuntimeError, match=r"already in `with replay.record\(\)`"),
        replay.replay([selection()] * 2),
    ):
        raise AssertionError


def test_an_error_inside_leaves_the_routers_free():
    model, x = Stack(), torch.randn(20, 6)
    free = model(x)
    replay = RouterReplay(model)
    with pytest.raises(ZeroDivisionError), replay.replay([selection()] * 2):
        1 / 0  # noqa: B018
    assert torch.equal(model(x), free)
    assert model.first.router.replay.target is None  # nor is its memory held


def test_through_compilation():
    torch._dynamo.reset()
    router = randomise(TokenChoiceTopKRouter(dim=6, num_experts=8, experts_per_token=3))
    compiled = torch.compile(router, fullgraph=True, backend="eager")
    replay = RouterReplay(nn.ModuleList([compiled]))
    x, info = torch.randn(20, 6), TokenInfo()
    with replay.record():
        compiled(x, info)
    recorded = replay.collect()
    assert len(recorded) == 1
    assert torch.equal(recorded[0], router(x, info).selected)
    with replay.replay([selection()]):
        assert torch.equal(compiled(x, info).selected, selection())
    assert torch.equal(compiled(x, info).selected, recorded[0])
