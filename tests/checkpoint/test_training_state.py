"""What training changes, taken apart by name and put together again bit for bit."""

import pytest
import torch
from helpers import randomise
from torchao.optim import AdamW4bit, AdamW8bit

from moe_builders.checkpoint.run_checkpoints import RunCheckpoints
from moe_builders.checkpoint.training_state import TrainingState
from moe_builders.errors import InputError
from moe_builders.families.qwen3_moe import qwen3_moe_tiny
from moe_builders.parallel.grad_norm import GradNorm
from moe_builders.parallel.sharding import shard_model
from moe_builders.training.stepping import Stepper

TOKENS = torch.arange(24).view(2, 12) % 64
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, centered=True),
    "8-bit": lambda p: AdamW8bit(p, lr=1e-2),
    "4-bit": lambda p: AdamW4bit(p, lr=1e-2),
}


@pytest.fixture(autouse=True)
def eager():
    torch.compiler.set_stance("force_eager")  # torchao compiles each shape, which takes seconds
    yield
    torch.compiler.set_stance("default")


def _run(world, make, *, seed=0, layers=1):
    model = qwen3_moe_tiny(vocab_size=64)
    randomise(model, seed=seed)
    shard_model(model, world, compute_dtype=torch.float32, reshard_after_forward=True)
    optimizer = make(list(model.parameters()))
    return model, optimizer, TrainingState(model, Stepper(optimizer, GradNorm()))


def _train(model, optimizer, steps):
    for _ in range(steps):
        model(TOKENS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _save(state, world, folder):
    checkpoints = RunCheckpoints(folder, world=world, keep_last=None)
    checkpoints.save(1, state.tensors(), {"numbers": state.numbers()}, {})
    return checkpoints.newest()


def _restore(state, checkpoint):
    state.load(checkpoint, checkpoint.facts["numbers"])


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_stopped_and_restored_is_as_if_never_stopped(world, tmp_path, make):
    model, optimizer, state = _run(world, make)
    _train(model, optimizer, 3)
    checkpoint = _save(state, world, tmp_path)
    other = _run(world, make, seed=1)
    _restore(other[2], checkpoint)
    for trained in ((model, optimizer), other[:2]):
        _train(*trained, 2)
    mine, theirs = state.tensors(), other[2].tensors()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[n], theirs[n]) for n in mine), "every bit"
    assert other[2].numbers() == state.numbers()


def test_names_and_what_quantised_entries_are_made_of(world):
    model, optimizer, state = _run(world, OPTIMIZERS["8-bit"])
    before = set(state.tensors())
    assert before == {f"model.{name}" for name in model.state_dict()}
    _train(model, optimizer, 1)
    new = set(state.tensors()) - before
    experts = "optimizer.layers.0.mlp.experts.down_proj"
    assert {n for n in new if n.startswith(experts)} == {
        f"{experts}.step",
        *(f"{experts}.{e}.{p}[0:8]" for e in ("exp_avg", "exp_avg_sq")
          for p in ("codes", "scale", "qmap")),
    }  # fmt: skip
    assert "optimizer.norm.weight.exp_avg" in new, "small ones are not quantised"


def test_options_are_the_configurations_but_what_the_optimizer_changed_is_state(world, tmp_path):
    model, optimizer, state = _run(world, OPTIMIZERS["adamw"])
    _train(model, optimizer, 1)
    optimizer.param_groups[0]["k"] = 5  # as schedule-free optimizers count
    optimizer.param_groups[0]["lr"] = 0.5  # a schedule's doing
    checkpoint = _save(state, world, tmp_path)
    other = _run(world, lambda p: torch.optim.AdamW(p, lr=7.0, weight_decay=0.3))
    _restore(other[2], checkpoint)
    group = other[1].param_groups[0]
    assert (group["lr"], group["weight_decay"], group["k"]) == (7.0, 0.3, 5)


def test_a_parameter_that_never_had_a_gradient_has_no_entry(world, tmp_path):
    model, optimizer, state = _run(world, OPTIMIZERS["adamw"])
    gate = model.layers[1].mlp.router.gate.weight
    gate.requires_grad_(False)
    _train(model, optimizer, 1)
    checkpoint = _save(state, world, tmp_path)
    other = _run(world, OPTIMIZERS["adamw"], seed=1)
    _restore(other[2], checkpoint)
    assert other[0].layers[1].mlp.router.gate.weight not in other[1].state
    assert torch.equal(other[0].layers[1].mlp.router.gate.weight.full_tensor(), gate.full_tensor())


def test_what_does_not_fit_is_named(world, tmp_path):
    model, optimizer, state = _run(world, OPTIMIZERS["adamw"])
    _train(model, optimizer, 1)
    checkpoint = _save(state, world, tmp_path)
    with pytest.raises(InputError, match=r"holds the state of AdamW, which SGD cannot go on with"):
        _restore(_run(world, OPTIMIZERS["sgd"])[2], checkpoint)
    wider = qwen3_moe_tiny(vocab_size=80)
    shard_model(wider, world, compute_dtype=torch.float32, reshard_after_forward=True)
    other = TrainingState(wider, Stepper(torch.optim.AdamW(wider.parameters()), GradNorm()))
    with pytest.raises(InputError, match=r"model.output.weight is float32 \[80, 64\], was float32 "
                       r"\[64, 64\]"):  # fmt: skip
        _restore(other, checkpoint)
    amsgrad = _run(world, lambda p: torch.optim.AdamW(p, amsgrad=True))
    _train(*amsgrad[:2], 1)
    saved = _save(amsgrad[2], world, tmp_path / "b")
    plain = _run(world, OPTIMIZERS["adamw"])[2]
    with pytest.raises(InputError, match=r"only in the checkpoint \(.*exp_avg"):
        _restore(plain, saved)
