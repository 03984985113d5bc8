"""Every router through the recipe, from a configuration; biases over processes and a resume."""

import json

import moe_full_finetune as recipe
import pytest
import torch
from helpers_train import HF_CONFIG, VOCAB, NoTokenizer, config, learned_buffers, on_ranks
from safetensors.torch import load_file

from moe_builders.errors import InputError
from moe_builders.hub import create_hf_model
from moe_builders.parallel.world import open_world

ADAMW = {"_component_": "torch.optim.AdamW", "lr": 3e-3}
OWN = {
    "_component_": "moe_builders.generic.moe_transformer", "vocab_size": VOCAB, "embed_dim": 32,
    "num_layers": 2, "num_heads": 2, "num_experts": 4, "experts_per_token": 2,
    "expert_hidden_dim": 16, "max_seq_len": 64,
}  # fmt: skip
NO_BALANCE = {"load_balancing_coef": 0.0, "z_coef": 0.001}
ROUTERS = "moe_builders.routers"
WAYS = {
    "own": {"router": {"_component_": "custom_router.CosineRouter"}},
    "jitter": {"routing": {"jitter": "input_uniform", "jitter_scale": 0.01}},
    "capacity": {"routing": {"capacity_factor": 1.0, "min_capacity": 1}},
    "padded": {"routing": {"capacity_factor": 1.0, "min_capacity": 1, "pad_to_capacity": True,
                           "capacity_scope": "micro"}},
    "bias": {"model": OWN | {"expert_bias": True}, "expert_bias": {"update_rate": 0.01}},
    "quantile": {"model": OWN | {"expert_bias": True, "score_function": "sigmoid"},
                 "expert_bias": {"update_rate": 0.5, "rule": "quantile"}},
    "threshold": {"router": {"_component_": f"{ROUTERS}.ThresholdRouter", "threshold": 0.3},
                  "router_losses": {"load_balancing_coef": 0.01, "load_balancing_form": "st_moe"}},
    "coordinate": {"router": {"_component_": f"{ROUTERS}.CoordinateDescentRouter"}},
    "sinkhorn": {"router": {"_component_": f"{ROUTERS}.SinkhornRouter"},
                 "router_losses": NO_BALANCE},
    "hash": {"router": {"_component_": f"{ROUTERS}.HashRouter"}},
    "forced": {"router": {"_component_": f"{ROUTERS}.ForcedBalanceRouter"}},
    "ema": {"router": {"_component_": f"{ROUTERS}.ExpertChoiceTopKRouter", "capacity_factor": 2.0,
                       "inference": "threshold_ema"}, "router_losses": NO_BALANCE},
    "predictor": {"router": {"_component_": f"{ROUTERS}.ExpertChoiceTopKRouter",
                             "capacity_factor": 2.0, "inference": "predictor"},
                  "router_losses": NO_BALANCE | {"own_coef": 0.1}},
    "mse": {"router_losses": {"load_balancing_coef": 1.0, "load_balancing_form": "mse"}},
    "hf": {"router_losses": {"load_balancing_coef": 0.01, "load_balancing_form": "hf",
                             "load_balancing_scope": "micro"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    create_hf_model(folder, HF_CONFIG, seed=3)
    return folder


def way_of(folder, way, **changes):
    values = {"model": OWN, "optimizer": ADAMW, "max_steps": 12, "batch_size": 8} | WAYS[way]
    return config(folder, **(values | changes))


@pytest.mark.parametrize("way", WAYS)
def test_it_trains_and_validates(way, tmp_path):
    val = {"_component_": "helpers_train.RaggedDataset", "num_samples": 6, "seed": 7}
    trained = recipe.main(way_of(tmp_path, way, dataset_val=val))
    first, last = (v["val_loss"] for v in trained.validations)
    assert last < first
    assert all(torch.isfinite(torch.tensor(v["loss"])) for v in trained.history)


@pytest.mark.parametrize("way", ["bias", "quantile", "ema", "sinkhorn", "capacity", "threshold"])
def test_recomputation_changes_no_bit(way, tmp_path):
    """Noise, drops and what learns after a step are those of the first forward."""
    runs = []
    for name, recompute in (("plain", False), ("again", True)):
        cfg = way_of(tmp_path / name, way, enable_activation_checkpointing=recompute, max_steps=4)
        folder = recipe.main(cfg).model_folder
        runs.append(load_file(folder / "model.safetensors"))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_counted_beforehand_is_what_is_routed_with_the_same_noise(
    checkpointing, tmp_path, monkeypatch
):
    """Two micro-batches under much noise: counts of the forward before and of the one that trains.

    Random numbers go on from where they would have been without the counting.
    """
    losses = {"load_balancing_coef": 1.0, "load_balancing_scope": "global"}
    seen, ends, count = [], [], recipe.step_counts
    monkeypatch.setattr(recipe, "step_counts", lambda *a: seen.append(count(*a)) or seen[-1])
    for exact in (True, False):
        cfg = way_of(
            tmp_path, "jitter", routing={"jitter": "gumbel", "jitter_scale": 1.0},
            router_losses=losses | {"global_exact": exact}, gradient_accumulation_steps=2,
            enable_activation_checkpointing=checkpointing,
        )  # fmt: skip
        with open_world(device="cpu") as world:
            torch.manual_seed(0)
            model = recipe.build_model(cfg, world).model
            loader = recipe.build_loader(cfg, world, NoTokenizer(), validation=False)
            step = next(loader.steps(epochs=1))
            values = recipe.train_step(model, step, cfg, world)
            ends.append(torch.rand(3))
        assert torch.equal(seen[0].double(), values["load"][0])
    assert len(seen) == 1
    assert torch.equal(*ends)


def test_biases_are_the_same_on_every_process_and_for_every_number_of_them(tmp_path):
    """One process with 8 rows; one with 2 × 4; two with 4 each: the same load, the same bias."""
    ways = ("bias", "quantile")

    def cfg(name, way, **changes):
        return way_of(tmp_path / f"{name}_{way}", way, max_steps=5, **changes)

    on_two = {way: ("learned_buffers", cfg("two", way, batch_size=4)) for way in ways}
    two = on_ranks(2, on_two, tmp_path)
    for way in ways:
        one = learned_buffers(cfg("one", way))
        halves = learned_buffers(cfg("halves", way, batch_size=4, gradient_accumulation_steps=2))
        assert all(bias.any() for bias in one.values())
        for other in (halves, two[way]):
            for name, bias in one.items():
                torch.testing.assert_close(other[name], bias, rtol=0, atol=1e-6)


def test_a_resumed_run_goes_on_with_its_biases_and_thresholds(tmp_path):
    for way in ("bias", "ema"):
        straight = recipe.main(way_of(tmp_path / f"{way}a", way, max_steps=6))
        recipe.main(way_of(tmp_path / f"{way}b", way, max_steps=3, checkpoint_every_n_steps=3))
        resumed = recipe.main(way_of(tmp_path / f"{way}b", way, max_steps=6,
                                     checkpoint_every_n_steps=3))  # fmt: skip
        a, b = (load_file(t.model_folder / "model.safetensors") for t in (straight, resumed))
        assert any("expert_bias" in n or "cutoff" in n for n in a)
        assert all(torch.equal(a[name], b[name]) for name in a)


class TestHuggingFaceFolders:
    def test_another_router_on_the_folders_gates(self, base, tmp_path):
        still = {"_component_": "torch.optim.SGD", "lr": 0.0}
        cfg = config(tmp_path, model=None, base_model=str(base), max_steps=1, optimizer=still,
                     router={"_component_": f"{ROUTERS}.ThresholdRouter"})  # fmt: skip
        folder = recipe.main(cfg).model_folder
        before, after = (load_file(f / "model.safetensors") for f in (base, folder))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_a_run_says_that_its_export_does_not_name_the_router(self, base):
        from moe_builders.base_model import open_base_model

        router = {"_component_": f"{ROUTERS}.SinkhornRouter"}
        opened = [
            open_base_model(str(base), None, dtype=torch.float32, device=torch.device("cpu"),
                            seed=0, init_std=None, router=given)
            for given in (None, router)
        ]  # fmt: skip
        assert opened[0].notes == []
        (note,) = opened[1].notes
        assert "routes with moe_builders.routers.SinkhornRouter, which the layout of" in note

    def test_a_router_that_holds_more_is_refused(self, base, tmp_path):
        cfg = config(tmp_path, model=None, base_model=str(base),
                     router={"_component_": f"{ROUTERS}.ExpertChoiceTopKRouter",
                             "inference": "predictor"})  # fmt: skip
        with pytest.raises(InputError, match=r"predictor.*has no place for"):
            recipe.main(cfg)

    def test_a_bias_that_the_layout_cannot_hold_is_refused(self, base, tmp_path):
        cfg = config(tmp_path, model=None, base_model=str(base), expert_bias={"update_rate": 0.1})
        with pytest.raises(InputError, match="no router has a selection-only bias"):
            recipe.main(cfg)


def test_sinkhorn_with_a_balancing_loss_is_refused(tmp_path):
    cfg = way_of(tmp_path, "sinkhorn", router_losses={"load_balancing_coef": 0.01})
    with pytest.raises(InputError, match=r"router_losses\.load_balancing_coef is 0\.01"):
        recipe.main(cfg)


def test_a_bias_of_a_gate_that_is_frozen_by_name_is_refused(tmp_path):
    cfg = way_of(tmp_path, "bias", freeze=[r"router\.gate"])
    with pytest.raises(InputError, match="the gate is frozen, and its bias with it"):
        recipe.main(cfg)


def test_bare_expert_choice_is_refused_where_it_would_be_validated(tmp_path):
    val = {"_component_": "helpers_train.RaggedDataset", "num_samples": 6, "seed": 7}
    router = {"_component_": f"{ROUTERS}.ExpertChoiceTopKRouter"}
    cfg = way_of(tmp_path, "ema", router=router, dataset_val=val)
    with pytest.raises(InputError, match="inference"):
        recipe.main(cfg)


def test_the_saved_model_says_how_it_was_built(tmp_path):
    folder = recipe.main(way_of(tmp_path, "sinkhorn", max_steps=1)).model_folder
    marker = json.loads((folder / "moe_builders.json").read_text())
    assert marker["component"] == OWN
    assert marker["router"] == WAYS["sinkhorn"]["router"]


def test_a_misspelled_router_is_found_before_anything_else(tmp_path):
    wrong = {"_component_": f"{ROUTERS}.SinkhornRoute"}
    cfg = config(tmp_path, model=OWN, dataset=[{"_component_": "nothing.there"}], router=wrong)
    with pytest.raises(InputError, match=r"^router\._component_ is .*SinkhornRoute"):
        recipe.main(cfg)
