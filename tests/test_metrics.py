"""Load metrics on tables small enough to work out by hand."""

import math

import pytest
import torch

from moe_builders.metrics import (
    dead_experts,
    load_entropy,
    load_metrics,
    load_share,
    max_violation,
)

TABLE = torch.tensor(
    [
        [4, 4, 4, 4],  # balanced
        [16, 0, 0, 0],  # collapsed
        [8, 4, 4, 0],
    ],
    dtype=torch.int32,
)


def test_max_violation():
    assert max_violation(TABLE).tolist() == [0.0, 3.0, 1.0]
    assert float(max_violation(TABLE[2])) == 1.0


def test_dead_experts():
    assert dead_experts(TABLE).tolist() == [0, 3, 1]


def test_load_share():
    assert load_share(TABLE).tolist() == [[0.25] * 4, [1, 0, 0, 0], [0.5, 0.25, 0.25, 0]]


def test_load_entropy():
    # 8 4 4 0: (½·ln 2 + ½·ln 4) / ln 4 = 0.75
    assert load_entropy(TABLE).tolist() == pytest.approx([1, 0, 0.75], abs=1e-12)
    assert float(load_entropy(torch.tensor([1, 2]))) == pytest.approx(
        (math.log(3) / 3 + 2 / 3 * math.log(1.5)) / math.log(2), abs=1e-12
    )


def test_one_expert_is_balanced():
    one = torch.tensor([[5], [5]])
    assert max_violation(one).tolist() == [0, 0]
    assert load_entropy(one).tolist() == [1, 1]


def test_large_counts_are_exact():
    counts = torch.tensor([2**30 + 1, 2**30 - 1], dtype=torch.int64)
    assert float(max_violation(counts)) == 2.0**-30


def test_no_assignments_at_all_give_numbers():
    none = torch.zeros(2, 4, dtype=torch.int32)
    assert load_share(none).tolist() == [[0.0] * 4] * 2
    assert load_entropy(none).isfinite().all()
    assert max_violation(none).isfinite().all()


def test_a_log_line():
    line = load_metrics(TABLE)
    assert line == {
        "max_violation": 3.0,  # the worst layer
        "dead_experts": 4,  # of all layers
        "load_entropy": pytest.approx(1.75 / 3),  # the mean layer
    }
    assert isinstance(line["dead_experts"], int)
