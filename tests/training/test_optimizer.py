"""Optimizers and schedules from a config; plain ones on bf16 weights are refused."""

import pytest
import torch
from torch import nn
from torchtune.training import get_cosine_schedule_with_warmup

from moe_builders.errors import InputError
from moe_builders.training.optimizer import build_optimizer, build_scheduler, describe_schedule

ADAMW = {"_component_": "torch.optim.AdamW", "lr": 1e-3}
COSINE = {"_component_": "torchtune.training.get_cosine_schedule_with_warmup",
          "num_warmup_steps": 2}  # fmt: skip


class Stochastic(torch.optim.Optimizer):
    """Stands for an optimizer of somebody else's, outside torch.optim."""

    def __init__(self, parameters, lr=1.0):
        super().__init__(parameters, {"lr": lr})


def model(dtype=torch.float32):
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)


def test_over_all_parameters_that_take_a_gradient():
    net = model()
    net[1].bias.requires_grad_(False)
    optimizer = build_optimizer(ADAMW | {"weight_decay": 0.3, "betas": [0.8, 0.9]}, net)
    assert type(optimizer) is torch.optim.AdamW
    matrices, small = optimizer.param_groups
    assert [id(p) for p in matrices["params"]] == [id(net[0].weight), id(net[1].weight)]
    assert [id(p) for p in small["params"]] == [id(net[0].bias)]
    for group, decay in ((matrices, 0.3), (small, 0.0)):
        assert (group["lr"], group["weight_decay"], list(group["betas"])) == (
            1e-3,
            decay,
            [0.8, 0.9],
        )


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "adamw.AdamW", "NAdam", "Adafactor"])
def test_torchs_own_on_bf16_weights_are_refused_with_the_remedy(name):
    node = {"_component_": f"torch.optim.{name}", "lr": 1e-3}
    with pytest.raises(InputError, match="set param_dtype=fp32") as caught:
        build_optimizer(node, model(torch.bfloat16))
    assert "\n" not in str(caught.value)
    build_optimizer(node, model(torch.float32))


def test_one_bf16_weight_is_enough():
    net = model()
    net[1].to(torch.bfloat16)
    with pytest.raises(InputError, match="would round most updates away"):
        build_optimizer(ADAMW, net)
    for parameter in net[1].parameters():
        parameter.requires_grad_(False)
    build_optimizer(ADAMW, net)


def test_ones_own_on_bf16_weights_is_accepted():
    own = build_optimizer(
        {"_component_": "test_optimizer.Stochastic", "lr": 0.5}, model(torch.bfloat16))  # fmt: skip
    assert type(own) is Stochastic
    assert all("weight_decay" not in group for group in own.param_groups), "it knows of none"


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8", "Adam8bit", "_AdamW"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchaos_by_their_own_name_are_refused_with_ours(name, dtype):
    with pytest.raises(
        InputError, match=r"name moe_builders\.training\.low_bit\.AdamW8bit"
    ) as caught:
        build_optimizer({"_component_": f"torchao.optim.{name}", "lr": 1e-3}, model(dtype))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (None, "optimizer needs a _component_"),
        ("torch.optim.AdamW", "optimizer needs a _component_"),
        ({"lr": 1}, "optimizer needs a _component_"),
        (ADAMW | {"fusde": True}, r"unknown key optimizer.fusde \(did you mean 'fused'\?\); AdamW"),
        (ADAMW | {"fused": "yes"}, "optimizer.fused is 'yes', but must be true or false or null"),
        (ADAMW | {"lr": -1.0}, "optimizer: AdamW: Invalid learning rate: -1.0"),
        (ADAMW | {"lr": "high"}, "optimizer.lr is the text 'high', but must be a number"),
        (ADAMW | {"lr": None}, "optimizer.lr is null, but must be a number: set it"),
        (ADAMW | {"lr": float("nan")}, "optimizer.lr is nan, but must be a finite number"),
        (ADAMW | {"lr": float("inf")}, "optimizer.lr is inf, but must be a finite number"),
        (ADAMW | {"lr": [1]}, "optimizer: '.=' not supported"),
        (ADAMW | {"betas": 0.9}, r"optimizer.betas is 0.9, but must be a list of 2 numbers, such"),
        (ADAMW | {"betas": [0.9]}, r"optimizer.betas is \[0.9\], but must be a list of 2 numbers"),
        (ADAMW | {"betas": [0.9, "x"]}, "but must be a list of 2 numbers"),
        ({"_component_": "torch.optim.SGD", "momentum": None}, "optimizer.momentum is None, but"),
        ({"_component_": "torch.zeros"}, "optimizer._component_ names zeros, which is no optimiz"),
        ({"_component_": "builtins.list"}, "optimizer._component_ names list, which is no optimi"),
        ({"_component_": "builtins.sorted"}, "names sorted, which is no optimizer"),
        ({"_component_": "torch.optim.LBFGS"}, r"LBFGS computes the loss several times a step"),
        ({"_component_": "torch.optim.SparseAdam"}, "SparseAdam takes sparse gradients alone"),
        ({"_component_": "torch.optim.Muon"}, r"Muon takes matrices alone, but 0.bias is .4"),
        (ADAMW | {"params": []}, "optimizer: AdamW: multiple values for argument 'params'"),
        ({"_component_": "torch.optim.AdmW"}, r"torch.optim has no 'AdmW' \(did you mean"),
    ],
)  # fmt: skip
def test_bad_optimizers_are_one_sentence(node, message):
    with pytest.raises(InputError, match=message) as caught:
        build_optimizer(node, model())
    assert "\n" not in str(caught.value)


def test_a_schedule_over_the_runs_steps():
    optimizer = build_optimizer(ADAMW, model())
    scheduler = build_scheduler(COSINE, optimizer, num_steps=10)
    other = build_optimizer(ADAMW, model())
    wanted = get_cosine_schedule_with_warmup(other, num_warmup_steps=2, num_training_steps=10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        assert rates[-1] == other.param_groups[0]["lr"]
        for step in (optimizer.step, scheduler.step, other.step, wanted.step):
            step()
    assert rates[0] == 0
    assert rates[2] == 1e-3 == max(rates)
    assert rates[9] < 1e-4
    assert build_scheduler(None, optimizer, num_steps=10) is None


def test_schedules_that_do_not_ask_for_the_number_of_steps():
    optimizer = build_optimizer(ADAMW, model())
    node = {"_component_": "torch.optim.lr_scheduler.StepLR", "step_size": 1, "gamma": 0.5}
    scheduler = build_scheduler(node, optimizer, num_steps=10)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 5e-4


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_component_": COSINE["_component_"]}, "missing a required argument: 'num_warmup_steps'"),
        (COSINE | {"num_warmup_stepz": 2}, r"unknown key lr_scheduler.num_warmup_stepz \(did you"),
        (COSINE | {"num_warmup_steps": 0.1}, "lr_scheduler.num_warmup_steps is 0.1, but must be a"),
        ("cosine", "lr_scheduler needs a _component_"),
        ({"_component_": "torch.optim.AdamW"}, "lr_scheduler._component_ names AdamW, which"),
        ({"_component_": "torch.optim.Optimizer", "defaults": {}}, "names Optimizer, which"),
        ({"_component_": "builtins.id"}, "lr_scheduler._component_ names id, which makes no sched"),
        ({"_component_": "torch.optim.lr_scheduler.ReduceLROnPlateau"},
         "ReduceLROnPlateau asks for metrics at each step"),
    ],
)  # fmt: skip
def test_bad_schedules_are_one_sentence(node, message):
    with pytest.raises(InputError, match=message) as caught:
        build_scheduler(node, build_optimizer(ADAMW, model()), num_steps=10)
    assert "\n" not in str(caught.value)


def test_muon_over_matrices_alone():
    net = nn.Linear(3, 4, bias=False)
    assert type(build_optimizer({"_component_": "torch.optim.Muon"}, net)) is torch.optim.Muon


@pytest.mark.parametrize(
    ("warmup", "said"),
    [
        (9, []),
        (10, ["lr_scheduler.num_warmup_steps is 10, but the run has 10 steps"]),
        (11, ["11"]),
    ],
)
def test_a_warm_up_longer_than_the_run_is_said(warmup, said):
    found = describe_schedule(COSINE | {"num_warmup_steps": warmup}, num_steps=10)
    assert len(found) == len(said)
    assert all(part in sentence for part, sentence in zip(said, found, strict=True))
    assert describe_schedule(None, num_steps=1) == []
    assert describe_schedule({"_component_": "a.b"}, num_steps=1) == []
