"""Whole runs on ep 2 × dp_shard 2: they learn what one process learns."""

import statistics

import pytest
from helpers_grid import learning
from helpers_train import config, on_ranks

MESH = {"ep": 2, "dp_shard": 2, "batch_size": 2}  # four processes
ALONE = {"batch_size": 8}
LOW = "moe_builders.training.low_bit."
ADAMW = {"_component_": "torch.optim.AdamW", "lr": 3e-3}
OPTIMIZERS = {
    "plain": {"optimizer": ADAMW},
    "foreach": {"optimizer": ADAMW | {"foreach": True}},
    "fused": {"optimizer": ADAMW | {"fused": True}},
    "in backward": {"optimizer": ADAMW, "clip_grad_norm": None, "optimizer_in_bwd": True},
    "not in backward": {"optimizer": ADAMW, "clip_grad_norm": None},
    "8 bit": {"optimizer": {"_component_": LOW + "AdamW8bit", "lr": 3e-3}},
}
STEPS = {"in backward": 10, "not in backward": 10, "foreach": 10, "fused": 10}


def _cases(folder, share, names):
    return {
        name: ("helpers_grid.held_out", learning(
            folder / name, steps=STEPS.get(name, 50), **share, **OPTIMIZERS[name]))
        for name in names
    }  # fmt: skip


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meshes")
    parted = on_ranks(4, _cases(folder / "parted", MESH, OPTIMIZERS), folder)
    return parted, on_ranks(1, _cases(folder / "alone", ALONE, ["plain", "8 bit"]), folder)


def test_it_learns_as_one_process_does(answers):
    parted, alone = (found["plain"] for found in answers)
    assert alone["after"] < alone["before"] - 1
    assert parted["after"] == pytest.approx(alone["after"], abs=1e-5)
    assert parted["losses"] == pytest.approx(alone["losses"], abs=1e-5)


@pytest.mark.parametrize("name", ["foreach", "fused"])
def test_an_optimizer_steps_parameters_of_two_meshes_together(answers, name):
    parted, _ = answers
    assert parted[name]["losses"] == pytest.approx(parted["plain"]["losses"][:10], abs=1e-6)


def test_the_optimizer_in_backward_changes_nothing(answers):
    parted, _ = answers
    inside, plain = parted["in backward"], parted["not in backward"]
    assert inside["losses"] == pytest.approx(plain["losses"], abs=1e-6)
    assert inside["after"] == pytest.approx(plain["after"], abs=1e-6)


def test_states_in_eight_bits(answers):
    parted, alone = answers
    for found in (parted["8 bit"], alone["8 bit"]):
        assert found["after"] == pytest.approx(alone["plain"]["after"], abs=1e-2)
        assert found["losses"] != alone["plain"]["losses"], "states were quantised"


@pytest.mark.full
def test_the_curve_of_200_steps(tmp_path):
    """As near to one process as summing in another order comes on one process."""
    orders = {
        str(rows): {"batch_size": rows, "gradient_accumulation_steps": 8 // rows}
        for rows in (8, 4, 2, 1)
    } | {"padded": {"batch_size": 8, "pad_to_multiple_of": 32}}
    cases = {
        name: ("helpers_grid.held_out", learning(tmp_path / name, steps=200, **order))
        for name, order in orders.items()
    }
    alone = [found["after"] for found in on_ranks(1, cases, tmp_path).values()]
    case = ("helpers_grid.held_out", learning(tmp_path / "parted", steps=200, **MESH))
    parted = on_ranks(4, {"parted": case}, tmp_path)["parted"]["after"]
    spread = max(alone) - min(alone)
    assert 0 < spread < 1e-3
    assert abs(parted - statistics.median(alone)) <= 2 * spread, (parted, alone)


@pytest.mark.full
def test_compiled_layers_send_tokens_too(tmp_path):
    cases = {
        (dispatcher, compiled): ("first_step", config(
            tmp_path / "run", batch_size=4, ep=2, ep_dispatcher=dispatcher, compile=compiled))
        for dispatcher in ("all_to_all", "all_gather") for compiled in (False, True)
    }  # fmt: skip
    found = on_ranks(2, cases, tmp_path)
    for dispatcher in ("all_to_all", "all_gather"):
        eager, compiled = (found[dispatcher, way]["gradients"] for way in (False, True))
        for name, gradient in eager.items():
            assert (compiled[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
