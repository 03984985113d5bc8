"""The optimizer's and memory's keys through the whole recipe."""

import moe_full_finetune as recipe
import pytest
import torch
from helpers_train import HF_CONFIG, config, losses_and_weights
from hf_helpers import read_tensors, rewrite
from safetensors.torch import load_file

from moe_builders.errors import InputError
from moe_builders.hub import create_hf_model
from moe_builders.training.config import find_config, load_config
from moe_builders.training.optimizer import build_optimizer

BF16 = {"param_dtype": "bf16", "compute_dtype": "bf16"}
LOW = {"_component_": "moe_builders.training.low_bit.AdamW8bit", "lr": 5e-3}


@pytest.fixture(autouse=True)
def eager():
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A release as they come: all in bf16, its router too."""
    folder = tmp_path_factory.mktemp("base") / "model"
    create_hf_model(folder, HF_CONFIG, seed=3)
    file = folder / "model.safetensors"
    rewrite(folder, {name: t.bfloat16() for name, (_, t) in read_tensors([file]).items()})
    return folder


def test_bf16_weights_learn_and_leave_as_they_came(base, tmp_path, capsys):
    cfg = config(tmp_path, model=None, base_model=str(base), epochs=20, optimizer=LOW,
                 dataset__num_samples=8, batch_size=8, **BF16)  # fmt: skip
    trained = recipe.main(cfg)
    losses = [values["loss"] for values in trained.history]
    assert losses[-1] < losses[0] - 0.3
    before = load_file(base / "model.safetensors")
    after = load_file(trained.model_folder / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype == torch.bfloat16, name
        assert not torch.equal(tensor, before[name]), name
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("AdamW8bit keeps fp32 states") == 0


def test_what_is_not_quantised_is_said_once(tmp_path, capsys):
    recipe.main(config(tmp_path, max_steps=2, optimizer=LOW | {"block_size": 8192}))
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("AdamW8bit keeps fp32 states for 6 parameters") == 1


def test_in_backward_is_the_plain_run(tmp_path):
    changes = {"max_steps": 3, "clip_grad_norm": None, "lr_scheduler": {
        "_component_": "torchtune.training.get_cosine_schedule_with_warmup",
        "num_warmup_steps": 1}}  # fmt: skip
    plain = losses_and_weights(config(tmp_path / "a", **changes))
    inside = losses_and_weights(config(tmp_path / "b", optimizer_in_bwd=True, **changes))
    assert plain["loss"] == inside["loss"]
    assert plain["norm"] == pytest.approx(inside["norm"], rel=1e-12)
    for name, weight in plain["weights"].items():
        assert torch.equal(weight, inside["weights"][name]), name


def test_rates_of_rules_are_logged_and_frozen_weights_stay(tmp_path):
    start = losses_and_weights(config(tmp_path / "a", max_steps=1, optimizer={
        "_component_": "torch.optim.SGD", "lr": 0.0}))["weights"]  # fmt: skip
    cfg = config(tmp_path / "b", max_steps=2, freeze=["attn"], freeze_router=False,
                 param_groups=[{"match": "router", "lr": 1e-6}])  # fmt: skip
    trained = recipe.main(cfg)
    assert [(v["lr"], v["lr/router"]) for v in trained.history] == [(1e-3, 1e-6)] * 2
    weights = load_file(trained.model_folder / "model.safetensors")
    for name, weight in weights.items():
        assert torch.equal(weight, start[name]) == ("attn" in name), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": ["rooter"]}, r"^freeze\[0\] 'rooter' is found in no parameter's name"),
        ({"freeze": ["."]}, "leave some to learn"),
        ({"param_groups": [{"match": "router", "lrr": 1}]}, r"unknown key param_groups\[0\].lrr"),
        ({"optimizer": LOW | {"_component_": "torchao.optim.AdamW8bit"}},
         r"name moe_builders\.training\.low_bit\.AdamW8bit"),
        (BF16, r"set param_dtype=fp32 \(with compute_dtype=bf16\), or an optimizer that rounds st"),
        ({"param_dtype": "bf16", "freeze": ["router"], "optimizer": {
            "_component_": "torch.optim.SGD", "lr": 1.0}}, "would round most updates away"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        recipe.main(config(tmp_path, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["30B_A3B", "235B_A22B"])
def test_the_released_sizes_take_the_line_in_their_head(name):
    """What the comment says can be typed, and names an optimizer that takes what is left."""
    path = find_config(f"qwen3_moe/{name}_full")
    head = path.read_text().partition("output_dir:")[0].replace("\n#", " ")
    _, colon, line = head.partition("(docs/memory.md):")
    assert colon
    overrides = line.partition(" takes ")[0].split()
    assert len(overrides) == 6
    cfg = load_config(path, overrides)
    assert (cfg.param_dtype, cfg.optimizer_in_bwd, cfg.clip_grad_norm) == ("bf16", True, None)
    optimizer = build_optimizer(cfg.optimizer, torch.nn.Linear(2, 2).bfloat16())
    assert type(optimizer).__name__ == "AdamW8bit"
    assert load_config(path).optimizer["fused"] is True


def test_rules_can_be_typed():
    line = ["freeze=[attn, norm]", "param_groups=[{match: router, lr: 1e-6}]"]
    cfg = load_config(find_config("qwen3_moe/30B_A3B_full"), line)
    assert cfg.freeze == ["attn", "norm"]
    assert cfg.param_groups == [{"match": "router", "lr": 1e-6}]
