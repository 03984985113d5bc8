"""The long grid of splits: 3 and 4 processes, replicas, all scopes (`make test-full`)."""

import pytest
from helpers_train import config, on_ranks
from test_any_number_of_processes import FP64, GLOBAL, LABELS, SGD, _relative

# 12 samples a step each: (processes, batch_size, accumulation, dp_replicate)
SPLITS = {
    "three": (3, 4, 1, 1), "three_micro": (3, 2, 2, 1), "four": (4, 3, 1, 1),
    "four_micro": (4, 1, 3, 1), "two_by_two": (4, 3, 1, 2), "four_copies": (4, 3, 1, 4),
}  # fmt: skip
LOSSES = {
    "sequence": {}, "global": GLOBAL, "labels": LABELS, "global_labels": GLOBAL | LABELS,
    "checkpointed": {"enable_activation_checkpointing": True},
    "kept": {"reshard_after_forward": False},
    "packed": {"dataset__packed": True, "dataset__split_across_pack": True,
               "dataset__num_samples": 200},
}  # fmt: skip


def _cases(names, folder):
    cases = {}
    for name in names:
        _, batch_size, accumulation, copies = SPLITS.get(name, (1, 12, 1, 1))
        sizes = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation,
                 "dp_replicate": copies}  # fmt: skip
        for loss, changes in LOSSES.items():
            cfg = config(folder / f"{name}_{loss}", **sizes, **FP64, **SGD, **changes, max_steps=4)
            cases[f"{name}/{loss}"] = ("losses_and_weights", cfg)
    return cases


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    found = on_ranks(1, _cases(["one"], folder), folder)
    for size in (3, 4):
        names = [name for name, split in SPLITS.items() if split[0] == size]
        found |= on_ranks(size, _cases(names, folder), folder)
    return found


@pytest.mark.full
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("split", SPLITS)
def test_weights_after_four_steps(answers, split, loss):
    one, other = answers[f"one/{loss}"], answers[f"{split}/{loss}"]
    assert len(one["loss"]) == len(other["loss"]) == 4
    for name, weight in one["weights"].items():
        assert _relative(other["weights"][name], weight) <= 1e-10, name
