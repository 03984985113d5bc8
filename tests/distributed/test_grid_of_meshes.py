"""One process = every mesh of dp_replicate × dp_shard × ep, both dispatchers, however accumulated.

`make test` runs a pairwise choice of the grid, `make test-full` all of it and eight processes.
"""

import pytest
import torch
from helpers_grid import EIGHT, MESHES, all_cases, config_of, one_process, pairwise
from helpers_train import on_ranks

PAIRWISE = pairwise(all_cases())
ALL = [*all_cases(), *pairwise(all_cases(EIGHT))]
IN_FP32 = PAIRWISE[:6]


def _run(cases, folder):
    """{(case, dtype): answer}, each number of processes spawned once."""
    found = {}
    for size in sorted({_size(case) for case, _ in cases}):
        found |= on_ranks(
            size,
            {
                (case, dtype): ("helpers_grid.two_steps", config_of(case, folder, dtype=dtype))
                for case, dtype in cases
                if _size(case) == size
            },
            folder,
        )
    return found


def _size(case):
    return 1 if case[1] is None else (MESHES | EIGHT)[case[1]][0]


def _with_references(cases, dtype):
    return [(c, dtype) for c in [*cases, *dict.fromkeys(map(one_process, cases))]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    cases = _with_references(PAIRWISE, "fp64") + _with_references(IN_FP32, "fp32")
    return _run(cases, tmp_path_factory.mktemp("pairwise"))


@pytest.fixture(scope="module")
def whole_grid(tmp_path_factory):
    return _run(_with_references(ALL, "fp64"), tmp_path_factory.mktemp("grid"))


def _relative(got, wanted):
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def _check(got, wanted, limit):
    for value in ("loss", "balance", "z"):
        assert _relative(got["values"][value], wanted["values"][value]) <= limit / 10, value
    for name, gradient in wanted["gradients"].items():
        assert _relative(got["gradients"][name], gradient) <= limit, name


def _check_in_fp64(got, wanted):
    _check(got, wanted, 1e-10)
    assert torch.equal(got["values"]["load"][:2], wanted["values"]["load"][:2])
    assert min(wanted["norms"]) > 0.5, "clipping must have happened"
    assert got["norms"] == pytest.approx(wanted["norms"], rel=1e-10)
    for name, weight in wanted["weights"].items():
        assert _relative(got["weights"][name], weight) <= 1e-10, name
    for name, bias in wanted["biases"].items():
        assert bias.abs().max() > 0, "biases have learned"
        assert torch.equal(got["biases"][name], bias), name


def test_every_two_values_occur_together():
    pairs = {(a, b) for case in PAIRWISE for a in enumerate(case) for b in enumerate(case)}
    for case in all_cases():
        assert all((a, b) in pairs for a in enumerate(case) for b in enumerate(case))
    assert len(PAIRWISE) < 24


@pytest.mark.parametrize("case", PAIRWISE, ids=str)
def test_two_steps_in_fp64(answers, case):
    _check_in_fp64(answers[case, "fp64"], answers[one_process(case), "fp64"])


@pytest.mark.parametrize("case", IN_FP32, ids=str)
def test_gradients_in_fp32(answers, case):
    wanted = answers[one_process(case), "fp32"]
    assert wanted["margin"] > 1e-5, "no rounding can flip a choice"
    _check(answers[case, "fp32"], wanted, 1e-5)


@pytest.mark.full
@pytest.mark.parametrize("case", ALL, ids=str)
def test_the_whole_grid(whole_grid, case):
    _check_in_fp64(whole_grid[case, "fp64"], whole_grid[one_process(case), "fp64"])
