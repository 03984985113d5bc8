"""Stepping in backward and with states elsewhere changes no bit; the mechanism, in one process.

tests/distributed/test_optimizers.py does the same with sharded models and the whole recipe.
"""

import moe_full_finetune as recipe
import pytest
import torch
from helpers_train import NoTokenizer, bits_of, config
from torch import nn
from torch.distributed.tensor import DTensor

from moe_builders.errors import InputError
from moe_builders.parallel.grad_norm import GradNorm, global_grad_norm
from moe_builders.parallel.sharding import shard_model
from moe_builders.parallel.world import open_world
from moe_builders.training.low_bit import AdamW, AdamW4bit, AdamW8bit
from moe_builders.training.optimizer import build_scheduler
from moe_builders.training.stepping import HostStates, Stepper, step_alone

KINDS = {
    "AdamW": lambda g: torch.optim.AdamW(g, lr=1e-2),
    "fused": lambda g: torch.optim.AdamW(g, lr=1e-2, fused=True),
    "momentum": lambda g: torch.optim.SGD(g, lr=1e-2, momentum=0.9),
    "no states": lambda g: torch.optim.SGD(g, lr=1e-2),
    "8bit": lambda g: AdamW8bit(g, lr=1e-2),
    "4bit": lambda g: AdamW4bit(g, lr=1e-2),
    "rounding": lambda g: AdamW(g, lr=1e-2),
    "8bit rounding": lambda g: AdamW8bit(g, lr=1e-2),
}


@pytest.fixture(autouse=True)
def eager():
    with torch.compiler.set_stance("force_eager"):
        yield


class Tied(nn.Module):
    """A weight that is used twice, one without a gradient, and small ones."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(64, 64)
        self.inner = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, ids):
        return self.inner(self.embedding(ids)) @ self.embedding.weight.T


def build(kind):
    torch.manual_seed(3)
    net = Tied().to(torch.bfloat16 if "rounding" in kind else torch.float32)
    named = dict(net.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for n, p in named.items() if p.ndim < 2], "weight_decay": 0.0, "lr": 1e-3},
    ]
    return net, KINDS[kind](groups)


def backward(net, step):
    stream = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 64, (16,), generator=stream)
    nn.functional.cross_entropy(net(ids).float(), ids.roll(1)).backward()


def plain_tensors(value):
    if not hasattr(value, "__tensor_flatten__"):
        return [value]
    parts = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    return [t for part in parts if isinstance(part, torch.Tensor) for t in plain_tensors(part)]


def bits(net, optimizer):
    found = [p.detach().clone() for p in net.parameters()]
    for parameter in net.parameters():
        for key in sorted(optimizer.state.get(parameter, {})):
            value = optimizer.state[parameter][key]
            found += [t.clone() for t in plain_tensors(value)] if value is not None else []
    return found


def run(kind, make_stepper=Stepper, steps=4, **arguments):
    net, optimizer = build(kind)
    stepper = make_stepper(optimizer, GradNorm(), **arguments)
    schedule = {"_component_": "torch.optim.lr_scheduler.ExponentialLR", "gamma": 0.8}
    scheduler = build_scheduler(schedule, optimizer, num_steps=steps)
    norms = []
    for step in range(steps):
        backward(net, step)
        if stepper.in_backward:
            assert all(p.grad is None for p in net.parameters()), "freed"
        norms.append(stepper.norm())
        stepper.step()
        scheduler.step()
        assert all(p.grad is None for p in net.parameters())
    assert [len(g["params"]) for g in optimizer.param_groups] == [3, 3], "whole again"
    return bits(net, optimizer), torch.stack(norms)


def same(one, other):
    return len(one) == len(other) > 0 and all(map(torch.equal, one, other))


@pytest.mark.parametrize("kind", KINDS)
def test_in_backward_every_bit_is_the_plain_runs(kind):
    plain, norms = run(kind)
    inside, their_norms = run(kind, in_backward=True)
    assert same(plain, inside)
    torch.testing.assert_close(norms, their_norms, rtol=1e-12, atol=0)
    assert not same(plain, run(kind, steps=3, in_backward=True)[0])


def test_the_norm_is_of_the_gradients_as_they_came():
    net, optimizer = build("AdamW")
    other, _ = build("AdamW")
    stepper = Stepper(optimizer, GradNorm(), in_backward=True)
    backward(net, 0)
    backward(other, 0)
    torch.testing.assert_close(stepper.norm(), global_grad_norm(other.parameters()))
    with pytest.raises(InputError, match="run backward first"):
        stepper.norm()  # it was told, and starts anew


def test_gradients_live_one_at_a_time():
    net, optimizer = build("AdamW")
    alive = []

    class Watch(GradNorm):
        def add(self, parameter):
            alive.append(sum(p.grad is not None for p in net.parameters()))
            super().add(parameter)

    Stepper(optimizer, Watch(), in_backward=True)
    backward(net, 0)
    assert alive == [1] * 5, "of five parameters, that used twice among them, one each"


def test_a_step_that_fails_leaves_the_optimizer_whole():
    net, optimizer = build("AdamW")
    backward(net, 0)
    groups = optimizer.param_groups
    group = groups[1]
    members = list(group["params"])

    def fail():
        raise RuntimeError

    optimizer.step = fail
    with pytest.raises(RuntimeError):
        step_alone(optimizer, group, members[0])
    assert optimizer.param_groups is groups
    assert all(map(lambda a, b: a is b, group["params"], members))


class Movers:
    """The host is another copy in the same memory; counts what lies on the device."""

    def __init__(self):
        self.on_device, self.on_host, self.waited, self.most = set(), [], 0, 0

    def to_device(self, tensor):
        assert any(tensor is t for t in self.on_host), "what is brought was kept there"
        copy = tensor.clone()
        self.on_device.add(copy.data_ptr())
        self.most = max(self.most, len(self.on_device))
        return copy

    def to_host(self, tensor, into):
        self.on_device.discard(tensor.data_ptr())
        if into is None:
            into = torch.empty_like(tensor)
            self.on_host.append(into)
        assert any(into is t for t in self.on_host)
        return into.copy_(tensor)

    def wait(self):
        self.waited += 1


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_states_that_lie_elsewhere_change_no_bit(kind, in_backward):
    movers, seen = Movers(), {}

    def offloaded(optimizer, norm, **arguments):
        states = HostStates(optimizer, to_device=movers.to_device, to_host=movers.to_host,
                            wait=movers.wait)  # fmt: skip
        seen["optimizer"] = optimizer
        return Stepper(optimizer, norm, states=states, **arguments)

    plain, _ = run(kind)
    moved, _ = run(kind, offloaded, in_backward=in_backward)
    assert same(plain, moved)
    kept = [t for state in seen["optimizer"].state.values() for value in state.values()
            if value is not None and value.ndim for t in plain_tensors(value)]  # fmt: skip
    assert len(kept) == len(movers.on_host), "each has one place there, used again every step"
    assert all(any(t is h for h in movers.on_host) for t in kept)
    assert not movers.on_device
    if kind == "AdamW":
        assert movers.most == 2, "two states of one parameter at a time"


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "no states"])
def test_states_can_be_made_and_filled(kind, elsewhere):
    """What a resume does: the rest of the run is then the first run's, bit for bit."""
    net, optimizer = build(kind)
    stepper = Stepper(optimizer, GradNorm())
    for step in (0, 1):
        backward(net, step)
        stepper.step()
    other_net, other = build(kind)
    movers, states = Movers(), None
    if elsewhere:
        states = HostStates(
            other, to_device=movers.to_device, to_host=movers.to_host, wait=movers.wait
        )
    resumed = Stepper(other, GradNorm(), states=states)
    before = [p.detach().clone() for p in other_net.parameters()]
    rates = [float(g["lr"]) for g in other.param_groups]
    resumed.make_states()
    assert all(map(torch.equal, before, other_net.parameters()))
    assert [float(g["lr"]) for g in other.param_groups] == rates
    assert bool(movers.on_host) == elsewhere
    for mine, theirs in zip(other_net.parameters(), net.parameters(), strict=True):
        mine.detach().copy_(theirs.detach())
        if theirs in optimizer.state:  # one has no gradient, ever
            assert other.state[mine].keys() == optimizer.state[theirs].keys()
            for key, value in optimizer.state[theirs].items():
                assert type(other.state[mine][key]) is type(value)
                inner = zip(
                    plain_tensors(other.state[mine][key]), plain_tensors(value), strict=True
                )
                for to, origin in inner:
                    to.copy_(origin)
    for model, each in ((net, stepper), (other_net, resumed)):
        backward(model, 2)
        each.step()
    unused = {net.unused, other_net.unused}
    for pair in zip(net.parameters(), other_net.parameters(), strict=True):
        assert torch.equal(*pair)
        if unused.isdisjoint(pair):
            for key, value in optimizer.state[pair[0]].items():
                theirs = plain_tensors(other.state[pair[1]][key])
                assert same(plain_tensors(value), theirs), key


@pytest.mark.parametrize("kind", ["8bit", "AdamW"])
def test_sharded_states_keep_their_wrapping(tmp_path, kind):
    """Plain tensors inside a quantised one inside a sharded one."""
    found = []
    with open_world(device="cpu") as world:
        for elsewhere in (False, True):
            cfg = config(tmp_path, optimizer_in_bwd=True, clip_grad_norm=None)
            model = recipe.build_model(cfg, world).model
            if not isinstance(next(model.parameters()), DTensor):  # one process needs no shards
                shard_model(model, world, compute_dtype=torch.float32, reshard_after_forward=True)
            loader = recipe.build_loader(cfg, world, NoTokenizer(), validation=False)
            optimizer = KINDS[kind](list(model.parameters()))
            movers, states = Movers(), None
            if elsewhere:
                states = HostStates(
                    optimizer, to_device=movers.to_device, to_host=movers.to_host, wait=movers.wait
                )
            stepper = Stepper(optimizer, GradNorm(), in_backward=True, states=states)
            steps = loader.steps(epochs=1)
            for _ in range(2):
                recipe.train_step(model, next(steps), cfg, world)
                recipe.update(stepper, None, cfg)
            for parameter, state in optimizer.state.items():
                for value in (state["exp_avg"], state["exp_avg_sq"]):
                    assert isinstance(value, DTensor)
                    assert value.placements == parameter.placements
                    assert value.shape == parameter.shape
                    for tensor in plain_tensors(value):
                        assert any(tensor is t for t in movers.on_host) == elsewhere
            found.append([bits_of(t) for p, s in optimizer.state.items() for t in (p, *s.values())])
    assert found[0] == found[1]


def test_waiting_is_handed_on():
    movers = Movers()
    _, optimizer = build("AdamW")
    states = HostStates(
        optimizer, to_device=movers.to_device, to_host=movers.to_host, wait=movers.wait
    )
    Stepper(optimizer, GradNorm(), states=states).wait()
    assert movers.waited == 1
    Stepper(optimizer, GradNorm()).wait()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_accumulation_steps": 2, "clip_grad_norm": None},
         "gradient_accumulation_steps is 2, but must be 1: raise batch_size"),
        ({}, "clip_grad_norm is 1.0, but must be null: set clip_grad_norm=null"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_backward(tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        config(tmp_path, optimizer_in_bwd=True, **changes)
    assert "\n" not in str(caught.value)
