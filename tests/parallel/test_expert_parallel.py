"""Experts dealt out over four ranks: the answers and gradients of the whole layer."""

import pytest
import torch
from helpers_ep import DIM, EXPERTS, LAYERS
from helpers_train import on_ranks

from moe_builders.errors import InputError
from moe_builders.experts import ExpertList, ExpertNetwork, GroupedExperts
from moe_builders.parallel.expert_parallel import check_dispatcher

DISPATCHERS = ("all_to_all", "all_gather")
# all_gather adds a token's answers process by process: another order than on one
EXACT = {"all_to_all": 1e-14, "all_gather": 1e-13}


def _list():
    networks = [ExpertNetwork(dim=DIM, hidden_dim=4) for _ in range(EXPERTS)]
    return ExpertList(networks)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    cases = {}
    for dispatcher in DISPATCHERS:
        for ep in (2, 4):
            cases[dispatcher, ep] = ("helpers_ep.compare_layers", list(LAYERS), dispatcher, ep)
        cases[dispatcher, "bf16"] = (
            "helpers_ep.compare_layers", ["plain", "mid, biases"], dispatcher, 4, torch.bfloat16,
        )  # fmt: skip
        cases[dispatcher, "idle"] = ("helpers_ep.idle_experts", dispatcher)
    odd = {
        "six": GroupedExperts(dim=DIM, hidden_dim=4, num_experts=6),
        "list": _list(),
    }
    cases["refusals"] = ("helpers_ep.refusals", odd)
    return on_ranks(4, cases, tmp_path_factory.mktemp("ep"))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("ep", [2, 4])
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_as_on_one_process(answers, dispatcher, ep, name):
    assert answers[dispatcher, ep][name] <= EXACT[dispatcher]


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_in_half_precision(answers, dispatcher):
    for worst in answers[dispatcher, "bf16"].values():
        assert worst <= 2**-6  # roundings of bf16


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_experts_without_tokens_get_zeros(answers, dispatcher):
    found = answers[dispatcher, "idle"]
    assert (found[:2] > 0).all()
    assert (found[2:] == 0).all()


def test_what_cannot_be_dealt_out(answers):
    said = answers["refusals"]
    assert (
        said["six"]
        == ("ep is 4, but must divide the 6 experts of layers.0.mlp.experts: choose 1, 2, 3 or 6")
        or "num_experts" in said["six"]
    )
    assert "ExpertList) are no GroupedExperts of a MoE layer" in said["list"]
    assert "set ep=1, or stack them" in said["list"]


def test_dispatchers_have_names():
    with pytest.raises(InputError, match="ep_dispatcher 'deepep' is not one of all_to_all, all_g"):
        check_dispatcher("deepep")
