"""The recipe as a whole: switches that must not change numbers, and where models come and go."""

import json

import moe_full_finetune as recipe
import pytest
import torch
from helpers_train import (
    HF_CONFIG,
    VOCAB,
    RaggedDataset,
    config,
    first_step,
    losses_and_weights,
    on_ranks,
)
from safetensors.torch import load_file

from moe_builders.data.rows import PackedDataset
from moe_builders.decoder import MoEDecoder
from moe_builders.hub import create_hf_model, load_hf_model
from moe_builders.ops.documents import Documents

ADAMW = {"optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3}}
PACKED = {"_component_": "helpers_train.RaggedDataset", "packed": True, "num_samples": 12}
UNPACKED = PACKED | {"packed": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    create_hf_model(folder, HF_CONFIG, seed=3, max_shard_bytes=150_000)
    return folder


def _losses(cfg):
    return torch.tensor([values["loss"] for values in recipe.main(cfg).history])


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_changes_no_bit(tmp_path, mode):
    plain = losses_and_weights(config(tmp_path / "a", max_steps=4, **ADAMW))
    changes = {"enable_activation_checkpointing": True, "ac_mode": mode} | ADAMW
    saved = losses_and_weights(config(tmp_path / "b", max_steps=4, **changes))
    assert plain["loss"] == saved["loss"]
    assert all(torch.equal(plain["weights"][n], saved["weights"][n]) for n in plain["weights"])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "products: a loop over experts (a CPU multiplies one expert after the other)"),
        ({"expert_backend": "grouped"}, "(the back end is grouped; on a CPU a loop inside torch)"),
        ({"expert_backend": "loop"}, "a loop over experts (the back end is loop)"),
        ({"expert_backend": "bmm", "recompute_up": True}, "product of padded rows (the back end"),
        ({"recompute_up": True, "enable_activation_checkpointing": True, "ac_mode": "selective"},
         "a loop over experts (a CPU multiplies one expert after the other)"),
    ],
)  # fmt: skip
def test_experts_are_computed_as_asked_and_as_told(tmp_path, capsys, changes, told):
    plain = _losses(config(tmp_path / "a", max_steps=3, expert_backend="loop", **ADAMW))
    capsys.readouterr()
    found = _losses(config(tmp_path / "b", max_steps=3, **changes, **ADAMW))
    assert (plain - found).abs().max() <= 1e-5
    said = [line for line in capsys.readouterr().out.splitlines() if "experts' products" in line]
    assert len(said) == 1
    assert told in said[0]


def test_compiled_layers_give_the_same_losses(tmp_path):
    changes = {"max_steps": 3, "pad_to_multiple_of": 32} | ADAMW
    plain = _losses(config(tmp_path / "a", **changes))
    compiled = _losses(config(tmp_path / "b", compile=True, **changes))
    assert (plain - compiled).abs().max() <= 1e-5


def test_packed_rows_train_like_separate_ones(tmp_path):
    """Same documents, other rows: the same loss, router losses, load and gradients."""
    separate = first_step(config(tmp_path / "a", dataset=UNPACKED, batch_size=12, max_seq_len=64))
    packed = dict(PACKED, split_across_pack=False)
    rows = len(PackedDataset(RaggedDataset(None, 12), max_seq_len=64, split_across_pack=False))
    together = first_step(config(tmp_path / "b", dataset=packed, batch_size=rows, max_seq_len=64))
    assert together["values"]["tokens"] == separate["values"]["tokens"], "the same documents"
    for name in ("loss", "balance", "z"):
        torch.testing.assert_close(
            together["values"][name], separate["values"][name], rtol=1e-6, atol=0)  # fmt: skip
    loads = together["values"]["load"], separate["values"]["load"]
    assert torch.equal(*(load[:2] for load in loads)), "assigned and kept"
    torch.testing.assert_close(*(load[2] for load in loads))
    for name, gradient in separate["gradients"].items():
        difference = (together["gradients"][name] - gradient).abs().max()
        assert difference <= 1e-5 * gradient.abs().max(), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_documents_train_like_their_mask(checkpointing, tmp_path, monkeypatch):
    changes = {"dataset": PACKED | {"num_samples": 40}, "max_steps": 3, "batch_size": 2,
               "enable_activation_checkpointing": checkpointing} | ADAMW  # fmt: skip
    seen = []
    attend = MoEDecoder.forward

    def watched(self, tokens, *, mask, **others):
        seen.append(type(mask))
        return attend(self, tokens, mask=mask, **others)

    monkeypatch.setattr(MoEDecoder, "forward", watched)
    documents = _losses(config(tmp_path / "a", **changes))
    monkeypatch.setattr(MoEDecoder, "takes_documents", False)
    masked = _losses(config(tmp_path / "b", **changes))
    assert seen == [Documents] * 3 + [torch.Tensor] * 3
    torch.testing.assert_close(documents, masked, rtol=1e-6, atol=0)


def test_packed_rows_on_two_processes_train_as_on_one(tmp_path):
    changes = {"dataset": PACKED | {"num_samples": 40}, "param_dtype": "fp64",
               "compute_dtype": "fp64"}  # fmt: skip
    one = first_step(config(tmp_path / "one", batch_size=4, **changes))
    cfg = config(tmp_path / "two", batch_size=2, **changes)
    two = on_ranks(2, {"two": ("first_step", cfg)}, tmp_path)["two"]
    torch.testing.assert_close(two["values"]["loss"], one["values"]["loss"], rtol=1e-12, atol=0)
    for name, gradient in one["gradients"].items():
        worst = (two["gradients"][name] - gradient).abs().max()
        assert worst <= 1e-10 * gradient.abs().max(), name


def test_bf16_compute_stays_near_fp32(tmp_path):
    wide = _losses(config(tmp_path / "a", max_steps=5, **ADAMW))
    narrow = _losses(config(tmp_path / "b", max_steps=5, compute_dtype="bf16", **ADAMW))
    assert torch.isfinite(narrow).all()
    assert (wide - narrow).abs().mean() <= 0.05, "by chance a choice of expert flips"


def test_validation_covers_every_label_once(base, tmp_path):
    """Mean over all labels, with a last batch that is not full."""
    from moe_builders.data.batch import collate, shift_labels
    from moe_builders.losses import cross_entropy_sum

    val = {"_component_": "helpers_train.RaggedDataset", "num_samples": 11, "seed": 7}
    cfg = config(tmp_path, model=None, base_model=str(base), dataset_val=val, max_steps=1,
                 optimizer={"_component_": "torch.optim.SGD", "lr": 0.0})  # fmt: skip
    trained = recipe.main(cfg)
    model, _ = load_hf_model(base)
    nats = labels = 0
    for sample in RaggedDataset(None, 11, 7).samples:
        shifted = shift_labels(sample["labels"])
        batch = collate([{"tokens": sample["tokens"], "labels": shifted,
                          "lengths": [len(shifted)]}], pad_id=0)  # fmt: skip
        with torch.no_grad():
            nats += float(cross_entropy_sum(model(batch.tokens), batch.labels))
        labels += batch.num_labels
    assert [v["step"] for v in trained.validations] == [0, 1]
    for values in trained.validations:
        assert values["val_loss"] == pytest.approx(nats / labels, rel=1e-5)


def test_an_untouched_model_leaves_as_it_came_also_from_two_ranks(base, tmp_path):
    still = {"model": None, "base_model": str(base), "max_steps": 1, "batch_size": 2,
             "optimizer": {"_component_": "torch.optim.SGD", "lr": 0.0}}  # fmt: skip
    recipe.main(config(tmp_path / "one", **still))
    on_ranks(2, {"two": ("losses_and_weights", config(tmp_path / "two", **still))}, tmp_path)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    for run in ("one", "two"):
        model = tmp_path / run / "model"
        assert sorted(p.name for p in model.iterdir()) == sorted(p.name for p in base.iterdir())
        assert json.loads((model / "model.safetensors.index.json").read_text()) == index
        assert (model / "config.json").read_bytes() == (base / "config.json").read_bytes()
        for file in set(index["weight_map"].values()):
            before, after = load_file(base / file), load_file(model / file)
            assert before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_trained_export_loads_in_transformers(base, tmp_path):
    from transformers import AutoModelForCausalLM

    cfg = config(tmp_path, model=None, base_model=str(base), max_steps=2, **ADAMW)
    folder = recipe.main(cfg).model_folder
    theirs, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager")  # fmt: skip
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
    ours, _ = load_hf_model(folder)
    before, _ = load_hf_model(base)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)
        assert (ours(tokens) - before(tokens)).abs().max() > 1e-3, "it was trained"


def test_a_model_of_ones_own_trains_saves_and_goes_on(tmp_path):
    """examples/compose_model.py through the recipe, re-loaded from what was saved."""
    own = {"_component_": "compose_model.expert_choice_decoder", "vocab_size": VOCAB,
           "embed_dim": 32}  # fmt: skip
    even = {"load_balancing_coef": 0.0}  # expert choice is balanced as it is
    first = recipe.main(config(tmp_path / "a", model=own, max_steps=8, batch_size=8,
                               router_losses=even, **ADAMW))  # fmt: skip
    losses = [values["loss"] for values in first.history]
    assert losses[-1] < losses[0]
    marker = json.loads((first.model_folder / "moe_builders.json").read_text())
    assert marker["component"] == own
    still = {"_component_": "torch.optim.SGD", "lr": 0.0}
    again = recipe.main(config(tmp_path / "b", model=own, base_model=str(first.model_folder),
                               max_steps=1, optimizer=still, router_losses=even))  # fmt: skip
    before = load_file(first.model_folder / "model.safetensors")
    after = load_file(again.model_folder / "model.safetensors")
    assert before.keys() == after.keys()
    learned = {name for name in before if "router.cutoff" in name}  # by steps, not by gradients
    assert learned
    assert all(torch.equal(before[name], after[name]) for name in before.keys() - learned)


def test_the_log_holds_every_step(tmp_path):
    trained = recipe.main(config(tmp_path, max_steps=3))
    (log,) = (tmp_path / "logs").iterdir()
    lines = log.read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["Step 1", "Step 2", "Step 3"]
    wanted = {"step", "loss", "balance", "z", "own", "grad_norm", "lr", "tokens_per_second",
              "max_violation", "dead_experts", "load_entropy", "load_cv", "drop_rate",
              "peak_rss_gib", "cut_samples"}  # fmt: skip
    assert set(trained.history[0]) == wanted
    assert (tmp_path / "torchtune_config.yaml").is_file()
