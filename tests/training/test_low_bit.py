"""AdamW with small states and stochastic rounding, beside torch's own and torchao's.

Compilations take seconds for each shape: all but one test run the update eagerly.
"""

import io
import math
from types import SimpleNamespace

import pytest
import torch
import torchao.optim
from torch import nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard

from moe_builders.errors import InputError
from moe_builders.training import low_bit
from moe_builders.training.low_bit import AdamW, AdamW4bit, AdamW8bit, describe_unquantized
from moe_builders.training.optimizer import build_optimizer, build_scheduler
from moe_builders.training.shards import random_stream, shard_number, shard_numels

BF16, FP32 = torch.bfloat16, torch.float32
QUANTIZED = {AdamW8bit: "OptimState8bit", AdamW4bit: "OptimState4bit"}


@pytest.fixture
def eager():
    with torch.compiler.set_stance("force_eager"):
        yield


def draw(*shape, dtype=FP32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights(*shapes, dtype=FP32):
    return [nn.Parameter(draw(*s, dtype=dtype, seed=i)) for i, s in enumerate(shapes)]


def train(optimizer, steps=3, scale=1.0):
    members = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        for number, parameter in enumerate(members):
            gradient = draw(*parameter.shape, seed=100 * step + number)
            parameter.grad = (scale * gradient).to(parameter.dtype)
        optimizer.step()
    return members


def bits(optimizer):
    """Weights and states, taken apart to plain tensors."""
    found = []
    for parameter in (p for g in optimizer.param_groups for p in g["params"]):
        found.append(parameter.detach().clone())
        for state in optimizer.state[parameter].values():
            inner = state.__tensor_flatten__()[0] if hasattr(state, "__tensor_flatten__") else []
            found += [getattr(state, name).clone() for name in inner] or [state.clone()]
    return found


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("shape", [(64, 64), (5, 3), (7,), (2, 64, 64)])
def test_fp32_states_give_torchs_update(shape):
    ours, theirs = weights(shape), weights(shape)
    train(AdamW(ours, lr=1e-2, weight_decay=0.1), steps=10)
    train(torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1), steps=10)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=2e-6)  # 0.1 was moved


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(AdamW8bit, torchao.optim.AdamW8bit), (AdamW4bit, torchao.optim.AdamW4bit)],
)
def test_on_fp32_weights_each_bit_is_torchaos(ours, theirs):
    shapes = [(64, 64), (2, 64, 64), (33, 60), (64,)]
    own = ours(weights(*shapes), lr=1e-2, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.1)
    train(own)
    reference = theirs(weights(*shapes), lr=1e-2, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.1)
    train(reference)
    assert same(bits(own), bits(reference))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("kind", [AdamW8bit, AdamW4bit])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_what_is_quantised_and_what_stays_fp32(kind, dtype):
    kept = weights((64, 64), (64,), dtype=dtype)
    large = weights((64, 64), (2, 64, 64), (63, 65), (8, 256), (4096,), dtype=dtype)
    optimizer = kind([{"params": large}, {"params": kept, "quantize": False}], lr=1e-3)
    train(optimizer, steps=1)
    for parameter, quantized in zip(large + kept, [1, 1, 0, 0, 1, 0, 0], strict=True):
        state = optimizer.state[parameter]
        assert list(state) == ["step", "exp_avg", "exp_avg_sq"]
        assert (state["step"].dtype, state["step"].shape) == (FP32, ())
        for name in ("exp_avg", "exp_avg_sq"):
            assert state[name].shape == parameter.shape
            assert type(state[name]).__name__ == (QUANTIZED[kind] if quantized else "Tensor")
            assert state[name].dtype == FP32, "never the weights' bf16"
    assert optimizer.unquantized() == large[2:4]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    ("kind", "wanted"), [(AdamW8bit, 2.03125), (AdamW4bit, 1.0625), (AdamW, 8)]
)
def test_bytes_a_parameter_of_both_states(kind, wanted):
    """The numbers of docs/memory.md, besides a table of constants for each state."""
    parameters = weights((8, 128, 128))
    optimizer = kind(parameters)
    train(optimizer, steps=1)
    sizes = [t.numel() * t.element_size() for t in bits(optimizer)[2:] if t.shape != (256,)]
    total = sum(size for size in sizes if size > 16 * 4)
    assert total / parameters[0].numel() == pytest.approx(wanted, abs=1e-4)


def test_what_was_to_be_quantised_but_is_not_is_told():
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(60, 69), nn.Linear(16, 8)).to(BF16)
    node = {"_component_": "moe_builders.training.low_bit.AdamW8bit", "lr": 1e-3}
    (line,) = describe_unquantized(build_optimizer(node, net), net)
    assert line == (
        "AdamW8bit keeps fp32 states for 2 parameters, 0.0 MiB a process: their shards have fewer "
        "than 4096 values or are no whole blocks of 256: 1.weight [69, 60], 2.weight [8, 16]"
    )
    assert describe_unquantized(build_optimizer(node, net[0]), net[0]) == []
    assert describe_unquantized(torch.optim.SGD(net.parameters()), net) == []
    rules = [{"match": "[12].weight", "quantize": False}]
    assert describe_unquantized(build_optimizer(node, net, param_groups=rules), net) == []


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("kind", [AdamW, AdamW8bit])
def test_tiny_updates_of_bf16_weights_add_up(kind):
    """Steps of 1e-4 beside weights of 1, whose neighbours in bf16 lie 2^-8 apart."""
    steps, n = 200, 128 * 128
    moved = {}
    for name, dtype, rounds in [("fp32", FP32, True), ("up", BF16, True), ("plain", BF16, False)]:
        (parameter,) = [nn.Parameter(torch.ones(128, 128, dtype=dtype))]
        optimizer = kind([parameter], lr=1e-4, weight_decay=0.0, bf16_stochastic_round=rounds)
        for _ in range(steps):
            parameter.grad = -torch.ones_like(parameter)
            optimizer.step()
        moved[name] = float((parameter.detach().double() - 1).mean())
    # 8 bits of a state that comes from 0 are less than exact, but the same for both storages
    assert moved["fp32"] == pytest.approx(steps * 1e-4, rel=1e-3 if kind is AdamW else 0.1)
    assert moved["plain"] == 0
    # a walk of `steps` draws of the distance 2^-7 with probability p, averaged over n weights
    p = 1e-4 / 2**-7
    spread = 2**-7 * math.sqrt(steps * p * (1 - p) / n)
    assert abs(moved["up"] - moved["fp32"]) < 5 * spread
    assert 5 * spread < 0.05 * moved["fp32"]


@pytest.mark.usefixtures("eager")
def test_rounding_draws_its_own_numbers():
    """Not the run's: neither changed by them nor changing them; and not the same twice."""
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        optimizer = AdamW(weights((64, 64), (64, 64), dtype=BF16), lr=1e-3)
        with torch.no_grad():  # the same weights and gradients twice
            optimizer.param_groups[0]["params"][1].copy_(optimizer.param_groups[0]["params"][0])
        before = torch.get_rng_state()
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = draw(64, 64, seed=5, dtype=BF16)
        optimizer.step()
        assert torch.equal(torch.get_rng_state(), before)
        runs.append(bits(optimizer))
    assert same(*runs)
    first, second = optimizer.param_groups[0]["params"]
    assert 0 < (first != second).sum() < first.numel() / 2, "another stream for each parameter"
    streams = {optimizer._stream(p, step) for p in (first, second) for step in range(50)}
    assert len(streams) == 100, "and for each step"
    other = AdamW(weights((64, 64), dtype=BF16), rounding_seed=1)
    assert other._stream(other.param_groups[0]["params"][0], 1) != optimizer._stream(first, 1)


def sharded(shape, place, *axes):
    """Enough of a sharded tensor; an axis: (number of processes, sharded dim or None)."""
    kinds = [SimpleNamespace(is_replicate=lambda d=d: d is None, dim=d) for _, d in axes]
    mesh = SimpleNamespace(get_coordinate=lambda: place, size=lambda axis: axes[axis][0])
    return SimpleNamespace(shape=shape, placements=kinds, device_mesh=mesh, to_local=None)


def test_each_shard_has_a_stream_and_its_copies_the_same(monkeypatch):
    places = [(copy, part) for copy in (0, 1) for part in (0, 1, 2)]
    shards = [sharded((9, 4), place, (2, None), (3, 0)) for place in places]
    numbers = [shard_number(shard) for shard in shards]
    assert numbers == [(0,), (1,), (2,)] * 2
    optimizer = AdamW(weights((2, 2)))
    (parameter,) = optimizer.param_groups[0]["params"]
    streams = set()
    for number in numbers:
        monkeypatch.setattr(low_bit, "shard_number", lambda _, number=number: number)
        streams.add(optimizer._stream(parameter, 1))
    assert len(streams) == 3


@pytest.mark.parametrize(
    ("shape", "axes", "wanted"),
    [
        ((9, 4), [(3, 0)], {12}),
        ((10, 4), [(4, 0)], {12, 4}),  # torch.chunk: 3, 3, 3, 1
        ((1, 4), [(2, 0)], {4, 0}),
        ((5, 4), [(4, 0)], {8, 4, 0}),  # 2, 2, 1, 0
        ((8, 6), [(2, None), (4, 1)], {16, 0}),  # 2, 2, 2, 0 columns
        ((8, 8), [(2, 0), (2, 1)], {16}),
    ],
)
def test_sizes_of_all_shards(shape, axes, wanted):
    assert shard_numels(sharded(shape, None, *axes)) == wanted
    rows = torch.empty(shape[0]).chunk(axes[0][0])
    if len(axes) == 1:
        sizes = {len(part) * shape[1] for part in rows}
        assert sizes | ({0} if len(rows) < axes[0][0] else set()) == wanted


def test_sizes_where_experts_are_dealt_out_first():
    """8 experts: 2 processes get 4 each, of which 3 that share them hold 2, 2 and none."""
    placements = (_StridedShard(0, split_factor=2), Shard(0))
    mesh = SimpleNamespace(size=(3, 2).__getitem__)
    parameter = SimpleNamespace(
        shape=(8, 5), device_mesh=mesh, placements=placements, to_local=None
    )
    assert shard_numels(parameter) == {10, 0}


@pytest.mark.parametrize("seed", [None, 7])
def test_a_stream_ends_where_it_began(seed):
    before = torch.get_rng_state()
    with random_stream(torch.device("cpu"), seed):
        inside = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before) == (seed is not None)
    with random_stream(torch.device("cpu"), seed):
        assert torch.equal(torch.rand(3), inside) == (seed is not None)


@pytest.mark.usefixtures("eager")
def test_rounding_has_the_right_mean_and_only_two_answers():
    (parameter,) = weights((256, 256), dtype=BF16)
    before = parameter.detach().float()
    (wide,) = [nn.Parameter(before.clone())]
    gradient = draw(256, 256, seed=9)
    for p, optimizer in ((parameter, AdamW([parameter], lr=3e-4)), (wide, AdamW([wide], lr=3e-4))):
        p.grad = gradient.to(p.dtype).to(p.dtype)
        if p is wide:
            p.grad = gradient.to(BF16).float()
        optimizer.step()
    exact, rounded = wide.detach(), parameter.detach().float()
    assert ((rounded - exact).abs() <= exact.abs() * 2**-7).all(), "one of its two neighbours"
    assert (rounded != exact.to(BF16).float()).float().mean() > 0.05, "not always the nearest"
    assert abs(float((rounded - exact).mean())) < 5 * float((rounded - exact).std()) / 256


@pytest.mark.usefixtures("eager")
def test_schedules_fill_the_rate_of_every_group():
    net = nn.Sequential(nn.Linear(64, 64))
    node = {"_component_": "moe_builders.training.low_bit.AdamW8bit", "lr": 1e-3}
    rules = [{"match": "weight", "lr": 1e-4}]
    optimizer = build_optimizer(node, net, param_groups=rules)
    schedule = {"_component_": "torch.optim.lr_scheduler.StepLR", "step_size": 1, "gamma": 0.5}
    scheduler = build_scheduler(schedule, optimizer, num_steps=3)
    before = net[0].weight.detach().clone()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert (net[0].weight.detach() - before).abs().max() == pytest.approx(1e-4, rel=0.1)
    scheduler.step()
    assert [float(g["lr"]) for g in optimizer.param_groups] == pytest.approx([5e-4, 5e-5])
    optimizer.step()
    assert (net[0].weight.detach() - before).abs().max() == pytest.approx(1.5e-4, rel=0.1)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("kind", [AdamW, AdamW8bit, AdamW4bit])
def test_a_state_dict_comes_back_bit_for_bit(kind):
    shapes = [(64, 64), (3, 5)]
    optimizer = kind(weights(*shapes, dtype=BF16), lr=1e-2)
    train(optimizer, steps=2)
    other = kind(weights(*shapes, dtype=BF16), lr=1.0)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for mine, theirs in zip(other.state.values(), optimizer.state.values(), strict=True):
        assert mine["exp_avg"].dtype == theirs["exp_avg"].dtype == FP32
    with torch.no_grad():
        for to, origin in zip(other.state, optimizer.state, strict=True):
            to.copy_(origin)
    train(optimizer, steps=1)
    train(other, steps=1)
    assert same(bits(optimizer), bits(other))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("kind", [AdamW, AdamW8bit, AdamW4bit])
def test_a_step_without_gradient_and_rate_only_makes_the_states(kind):
    """What a resume builds before it fills the states in."""
    optimizer = kind(weights((64, 64), (3, 5), dtype=BF16), lr=0.0, weight_decay=0.0)
    members = train(optimizer, steps=1, scale=0.0)
    fresh = weights((64, 64), (3, 5), dtype=BF16)
    assert all(torch.equal(p, q) for p, q in zip(members, fresh, strict=True))
    assert set(optimizer.state) == set(members)


@pytest.mark.parametrize("kind", [AdamW8bit, AdamW4bit])
@pytest.mark.parametrize("size", [0, -1, 127])
def test_blocks_that_cannot_be(kind, size):
    with pytest.raises(InputError, match=f"block_size is {size}, but must be an even number"):
        kind(weights((2, 2)), block_size=size)


def test_without_a_compiler_there_is_one_sentence(monkeypatch):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(InputError, match=r"^AdamW8bit needs a C\+\+ compiler and found") as caught:
        AdamW8bit(weights((2, 2)))
    assert "\n" not in str(caught.value)


def test_compiled_and_eager_agree_and_repeat():
    """The one that compiles: states equal, bf16 weights two neighbours at most apart."""
    low_bit._compiled_update.cache_clear()
    answers = []
    for stance in ("default", "default", "force_eager"):
        with torch.compiler.set_stance(stance):
            optimizer = AdamW8bit(weights((64, 64), dtype=BF16), lr=1e-2)
            train(optimizer, steps=2)
        answers.append(bits(optimizer))
    assert same(answers[0], answers[1])
    weight, _, codes, *_ = answers[0]
    other, _, other_codes, *_ = answers[2]
    assert (weight.float() - other.float()).abs().max() <= 2**-6 * weight.float().abs().max()
    assert (codes.int() - other_codes.int()).abs().max() <= 1
    assert (weight != other).float().mean() < 0.9
