"""A step in which nothing is labelled is no NaN; a run that does reach one saves nothing."""

import math

import moe_full_finetune as recipe
import pytest
import torch
from helpers_train import VOCAB, config
from safetensors.torch import load_file

from moe_builders.errors import InputError
from moe_builders.losses import IGNORE_INDEX

SGD = {"optimizer": {"_component_": "torch.optim.SGD", "lr": 0.1}}
NO_ROUTER_LOSS = {"router_losses": {"load_balancing_coef": 0.0, "z_coef": 0.0}}


class HalfLabelled:
    """Documents of which only those from ``first`` on have labels; the first 8 make two steps."""

    def __init__(self, tokenizer, first=8, start=0, empty=False):
        stream = torch.Generator().manual_seed(0)
        self.samples = []
        for number in range(12):
            tokens = torch.randint(0, VOCAB, (6,), generator=stream).tolist()
            labels = tokens if number >= first else [IGNORE_INDEX] * 6
            self.samples.append({"tokens": tokens, "labels": labels})
        del self.samples[:start]
        if empty:
            self.samples[:4] = [{"tokens": [], "labels": []}] * 4

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def run(folder, *, dataset=None, **changes):
    node = {"_component_": "test_without_labels.HalfLabelled"} | (dataset or {})
    return recipe.main(config(folder, dataset=node, shuffle=False, **(SGD | changes)))


def weights_of(trained):
    return load_file(trained.model_folder / "model.safetensors")


def all_finite(trained):
    return (
        all(math.isfinite(v) for step in trained.history for v in step.values())
        and all(math.isfinite(v) for step in trained.validations for v in step.values())
        and all(w.isfinite().all() for w in weights_of(trained).values())
    )  # fmt: skip


@pytest.mark.parametrize("mask", ["padding", "labels"])
@pytest.mark.parametrize("scope", ["sequence", "micro", "global"])
def test_steps_without_a_label_stay_finite(tmp_path, mask, scope):
    trained = run(tmp_path, router_losses__mask=mask, router_losses__load_balancing_scope=scope)
    assert all_finite(trained)
    losses = [step["loss"] for step in trained.history]
    assert losses[:2] == [0.0, 0.0]
    assert losses[2] > 1
    balances = [step["balance"] for step in trained.history]
    assert all(balance == 0 for balance in balances[:2]) == (mask == "labels")


def test_without_router_losses_nothing_moves_until_there_is_a_label(tmp_path):
    started = weights_of(run(tmp_path / "a", max_steps=1, optimizer={
        "_component_": "torch.optim.SGD", "lr": 0.0}))  # fmt: skip
    for steps, moved in ((2, False), (3, True)):
        trained = run(tmp_path / str(steps), max_steps=steps, **NO_ROUTER_LOSS)
        assert all_finite(trained)
        after = weights_of(trained)
        same = all(torch.equal(after[name], started[name]) for name in started)
        assert same != moved
        assert [step["grad_norm"] for step in trained.history[:2]] == [0.0, 0.0]


def test_micro_batches_without_labels_add_nothing_to_their_step(tmp_path):
    """Two of three: loss and gradient are those of the third alone."""
    both = run(tmp_path / "a", gradient_accumulation_steps=3, **NO_ROUTER_LOSS)
    alone = run(tmp_path / "b", dataset={"start": 8}, **NO_ROUTER_LOSS)
    assert all_finite(both)
    assert len(both.history) == len(alone.history) == 1
    for name in ("loss", "grad_norm"):
        assert both.history[0][name] == pytest.approx(alone.history[0][name], rel=1e-6)


def test_documents_without_a_token(tmp_path):
    """A whole micro-batch of padding."""
    trained = run(tmp_path, dataset={"empty": True})
    assert all_finite(trained)
    assert trained.history[0]["loss"] == trained.history[0]["balance"] == 0


def test_validation_batches_without_labels_add_nothing(tmp_path):
    val = {"_component_": "test_without_labels.HalfLabelled"}
    trained = run(tmp_path / "a", dataset_val=val, max_steps=1)
    alone = run(tmp_path / "b", dataset_val=val | {"start": 8}, max_steps=1)
    assert all_finite(trained)
    for values, wanted in zip(trained.validations, alone.validations, strict=True):
        assert values["val_loss"] == pytest.approx(wanted["val_loss"], rel=1e-6)
        assert values["val_loss"] > 1


@pytest.mark.parametrize("which", ["dataset", "dataset_val"])
def test_a_data_set_without_any_label_is_refused(tmp_path, which):
    nodes = {"dataset_val": {"_component_": "test_without_labels.HalfLabelled", "first": 12}}
    if which == "dataset":
        nodes = {"dataset": {"first": 12}}
    with pytest.raises(InputError, match=f"^{which}: no token of the first 12 rows is trained on"):
        run(tmp_path, **nodes)


@pytest.mark.parametrize("max_steps", [3, 2])
def test_a_run_that_diverges_says_so_and_saves_nothing(tmp_path, max_steps):
    """Also in its last step, which nobody would look at before saving."""
    huge = {"optimizer": {"_component_": "torch.optim.SGD", "lr": 1e38}, "clip_grad_norm": None}
    message = (
        r"(loss|grad_norm) is (nan|inf) at step 2, first in .+ on rank 0: training has diverged "
        "and nothing is saved"
    )
    with pytest.raises(InputError, match=message):
        run(tmp_path, dataset={"first": 0}, max_steps=max_steps, **huge)
    assert not (tmp_path / "model").exists()
