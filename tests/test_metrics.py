"""Load metrics on tables small enough to work out by hand."""

import math
import statistics

import pytest
import torch
from helpers import quick
from hypothesis import given
from hypothesis import strategies as st

from moe_builders.metrics import (
    dead_experts,
    detailed_metrics,
    drop_rate,
    extreme_experts,
    layer_metrics,
    load_cv,
    load_diversity,
    load_entropy,
    load_metrics,
    load_share,
    max_violation,
    relative_load,
    usage,
    usage_variance,
)

TABLE = torch.tensor(
    [
        [4, 4, 4, 4],  # balanced
        [16, 0, 0, 0],  # collapsed
        [8, 4, 4, 0],
    ],
    dtype=torch.int32,
)


KEPT = torch.tensor([[4, 4, 4, 4], [4, 0, 0, 0], [4, 4, 4, 0]])
SCORES = torch.tensor([[2.0, 2, 2, 2], [8, 0, 0, 0], [4, 2, 1, 1]], dtype=torch.float64)
LOAD = torch.stack([TABLE.double(), KEPT.double(), SCORES])


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


def test_cv_is_the_samples_deviation_over_the_mean():
    assert load_cv(TABLE).tolist() == pytest.approx([0, 2, (2 / 3) ** 0.5], abs=1e-15)
    assert float(load_cv(TABLE[2])) == statistics.stdev([8, 4, 4, 0]) / 4
    collapsed = torch.tensor([64] + [0] * 63)
    assert float(load_cv(collapsed)) == pytest.approx(8), "√e, with the sample's e - 1"


def test_diversity():
    assert load_diversity(TABLE).tolist() == pytest.approx(
        [1, 0.25, math.exp(1.5 * math.log(2)) / 4]
    )
    assert load_diversity(torch.tensor([3, 3, 0, 0])).tolist() == pytest.approx(0.5)


def test_drop_rate():
    assert drop_rate(TABLE, KEPT).tolist() == [0, 0.75, 0.25]
    assert drop_rate(TABLE, TABLE).tolist() == [0, 0, 0]


def test_usage_is_the_mean_score():
    assert usage(SCORES).tolist() == (SCORES / 8).tolist()
    spread = (0.25**2 + 0 + 0.125**2 + 0.125**2) / 4
    assert usage_variance(SCORES).tolist() == pytest.approx([0, 0.1875, spread], abs=1e-15)


def test_relative_load():
    assert relative_load(TABLE).tolist() == [[1] * 4, [4, 0, 0, 0], [2, 1, 1, 0]]


@quick
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=9))
def test_bounds_of_every_measure(counts):
    table = torch.tensor(counts)
    e, total = len(counts), sum(counts)
    assert 0 <= float(load_cv(table)) <= e**0.5 + 1e-9
    diversity = float(load_diversity(table))
    assert diversity == 0 if total == 0 else 1 / e - 1e-9 <= diversity <= 1 + 1e-9
    if total:
        mean = total / e
        assert float(load_cv(table)) == pytest.approx(statistics.stdev(counts) / mean)
        assert float(relative_load(table).sum()) == pytest.approx(e)


def test_a_log_line():
    line = load_metrics(LOAD)
    assert line == {
        "max_violation": 3.0,  # the worst layer
        "dead_experts": 4,  # of all layers
        "load_entropy": pytest.approx(1.75 / 3),  # the mean layer
        "load_cv": pytest.approx((2 + (2 / 3) ** 0.5) / 3),
        "drop_rate": pytest.approx(16 / 48),  # of all assignments
    }
    assert isinstance(line["dead_experts"], int)


def test_layers_by_themselves():
    lists = layer_metrics(LOAD)
    assert lists["max_violation"] == [0, 3, 1]
    assert lists["drop_rate"] == [0, 0.75, 0.25]
    assert lists["load_cv"] == load_cv(TABLE).tolist()
    assert lists["load_diversity"] == load_diversity(TABLE).tolist()
    assert lists["usage_variance"] == usage_variance(SCORES).tolist()
    assert lists["dead_experts"] == [0, 3, 1]
    assert lists["load_entropy"] == load_entropy(TABLE).tolist()


def test_how_layers_and_experts_differ():
    found = detailed_metrics(LOAD)
    root, third = (2 / 3) ** 0.5, 2**1.5 / 4
    assert found == pytest.approx({
        "load_cv_median": root, "load_cv_min": 0, "load_cv_max": 2,
        "load_diversity": (1 + 0.25 + third) / 3, "load_diversity_min": 0.25,
        "dead_expert_frac": 4 / 12,
        # 0 0 0 0 1 1 1 1 1 1 2 4: a quarter lies at place 2.75, three at 8.25
        "utilisation_min": 0, "utilisation_p25": 0, "utilisation_median": 1,
        "utilisation_p75": 1, "utilisation_max": 4,
        "usage_variance": float(usage_variance(SCORES).mean()),
    })  # fmt: skip


def test_quantiles_lie_between_two_experts_in_proportion():
    counts = torch.tensor([[1.0, 2, 3, 6]], dtype=torch.float64)
    found = detailed_metrics(torch.stack([counts, counts, counts]))
    assert found["utilisation_p25"] == pytest.approx((1 + 0.75) / 3)
    assert found["utilisation_p75"] == pytest.approx((3 + 0.25 * 3) / 3)


def test_the_most_and_the_least_used_experts():
    assert extreme_experts(TABLE, 1) == {(1, 1): 0, (1, 0): 4}
    assert extreme_experts(TABLE, 2) == {(1, 1): 0, (1, 2): 0, (2, 0): 2, (1, 0): 4}
    assert extreme_experts(TABLE, 0) == {}
    everyone = extreme_experts(TABLE, 99)
    assert len(everyone) == 12, "each once"
    assert everyone[2, 1] == 1


def test_nothing_counted_gives_numbers():
    none = torch.zeros(3, 2, 4, dtype=torch.float64)
    for values in (*layer_metrics(none).values(), load_metrics(none).values(),
                   detailed_metrics(none).values()):  # fmt: skip
        assert all(math.isfinite(value) for value in values)
    assert load_diversity(none[0]).tolist() == [0, 0]
    assert drop_rate(none[0], none[1]).tolist() == [0, 0]
    assert usage_variance(none[2]).tolist() == [0, 0]
    one = torch.full((3, 1, 1), 5.0, dtype=torch.float64)
    assert load_metrics(one)["load_cv"] == 0, "one expert has no spread"
