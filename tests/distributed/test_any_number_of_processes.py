"""1 process = 2 processes = 4 micro-batches, with unequal numbers of labelled tokens."""

import pytest
import torch
from helpers_train import config, on_ranks

SPLITS = {  # all of them 4 samples a step: (processes, batch_size, accumulation)
    "one": (1, 4, 1),
    "micro": (1, 1, 4),
    "two": (2, 2, 1),
    "two_micro": (2, 1, 2),
    "copies": (2, 2, 1),  # two replicas instead of two shards
}
FP64 = {"param_dtype": "fp64", "compute_dtype": "fp64"}
SGD = {"optimizer": {"_component_": "torch.optim.SGD", "lr": 0.05}, "clip_grad_norm": 0.5}
ADAMW = {"optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3}}
GLOBAL = {"router_losses__load_balancing_scope": "global", "router_losses__global_exact": True}
LABELS = {"router_losses__mask": "labels"}
CASES = {
    "grad64": ("first_step", FP64),
    "grad64_global": ("first_step", FP64 | GLOBAL),
    "grad64_labels": ("first_step", FP64 | LABELS),
    "grad32": ("first_step", {}),
    "sgd64": ("losses_and_weights", FP64 | SGD | {"max_steps": 5}),
    "adamw32": ("losses_and_weights", ADAMW | {"max_steps": 20}),
}


def _cases(split, folder):
    _, batch_size, accumulation = SPLITS[split]
    sizes = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    if split == "copies":
        sizes["dp_replicate"] = 2
    return {
        f"{split}/{name}": (function, config(folder / f"{split}_{name}", **sizes, **changes))
        for name, (function, changes) in CASES.items()
        if split != "copies" or "64" in name
    }


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("splits")
    found = {}
    for size in (1, 2):
        cases = {}
        for split in SPLITS:
            if SPLITS[split][0] == size:
                cases |= _cases(split, folder)
        if size == 2:
            cases["noise"] = ("draws_after_a_run", config(folder / "noise", max_steps=1))
        found |= on_ranks(size, cases, folder)
    return found


def _relative(a, b):
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def _splits(name):
    return [s for s in SPLITS if s != "one" and (s != "copies" or "64" in name)]


@pytest.mark.parametrize("case", ["grad64", "grad64_global", "grad64_labels"])
def test_gradients_in_fp64_do_not_depend_on_the_split(answers, case):
    one = answers[f"one/{case}"]
    assert all(g.abs().max() > 0 for g in one["gradients"].values())
    for split in _splits(case):
        other = answers[f"{split}/{case}"]
        for name, gradient in one["gradients"].items():
            assert _relative(other["gradients"][name], gradient) <= 1e-10, (split, name)
        for value in ("loss", "balance", "z"):
            assert _relative(other["values"][value], one["values"][value]) <= 1e-12, (split, value)
        got, wanted = other["values"]["load"], one["values"]["load"]  # [3, l, e]
        assert torch.equal(got[:2], wanted[:2]), "assigned and kept"
        assert _relative(got[2], wanted[2]) <= 1e-12, "sums of scores"


def test_the_split_matters_to_a_wrong_mean(answers):
    """The data would catch a mean of means: micro-batches have unequal numbers of labels."""
    sequence = answers["one/grad64"]["gradients"]
    labels = answers["one/grad64_labels"]["gradients"]
    name = "layers.0.mlp.router.gate.weight"
    assert _relative(labels[name], sequence[name]) > 1e-3


def test_gradients_in_fp32(answers):
    one = answers["one/grad32"]
    assert one["margin"] > 1e-4, "no rounding can flip a choice"
    for split in _splits("grad32"):
        other = answers[f"{split}/grad32"]
        assert _relative(other["values"]["loss"], one["values"]["loss"]) <= 1e-6
        for name, gradient in one["gradients"].items():
            assert _relative(other["gradients"][name], gradient) <= 1e-5, (split, name)


def test_weights_after_five_clipped_sgd_steps_in_fp64(answers):
    one = answers["one/sgd64"]
    assert min(one["norm"]) > 0.5, "clipping must have happened"
    for split in _splits("sgd64"):
        other = answers[f"{split}/sgd64"]
        assert len(other["loss"]) == 5
        for name, weight in one["weights"].items():
            assert weight.dtype == torch.float64
            assert _relative(other["weights"][name], weight) <= 1e-10, (split, name)


def test_twenty_adamw_losses_in_fp32(answers):
    one = torch.tensor(answers["one/adamw32"]["loss"])
    assert len(one) == 20
    assert one[-5:].mean() < one[:5].mean(), "it learns"
    for split in _splits("adamw32"):
        other = torch.tensor(answers[f"{split}/adamw32"]["loss"])
        assert (other - one).abs().max() <= 1e-4, split


def test_processes_draw_noise_of_their_own(answers):
    first, second = answers["noise"]
    assert first != second
