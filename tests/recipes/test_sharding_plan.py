"""The recipe that shows a plan: from built-in configurations, from config.json alone."""

import json
import re

import moe_sharding_plan as recipe
import pytest
from helpers_train import HF_CONFIG

from moe_builders.errors import InputError
from moe_builders.training.config import parse_command_line

ARGS = ["--config", "qwen3_moe/30B_A3B_full"]
BUILT = ["~base_model", "model=moe_builders.families.qwen3_moe.qwen3_moe_30b_a3b"]


def shown(*args):
    config = parse_command_line([*ARGS, *args], schema=recipe.PlanConfig)
    return recipe.main(config)


def test_a_built_in_configuration(capsys):
    text = shown(*BUILT, "world_size=16", "ep=8")
    assert capsys.readouterr().out == text
    head, _, header, line, *_ = text.splitlines()
    assert head == (
        "30,532,122,624 parameters (3,353,032,704 active) on 16 processes: dp_replicate 1, "
        "dp_shard 2, ep 8; 131,072 tokens a step, 252.1 TFLOP each process"
    )
    assert header.split()[:3] == ["parameter", "shape", "group"]
    assert len(line) == len(header)
    rows = {row.split("  ")[0]: row for row in text.splitlines()}
    assert rows["layers.*.mlp.experts.down_proj"].split("  ")[1:] != []
    cells = [c.strip() for c in rows["layers.*.mlp.experts.down_proj"].split("  ") if c.strip()]
    assert cells == [
        "layers.*.mlp.experts.down_proj", "[128, 2048, 768]", "experts", "0: ep 8, 0: dp_shard 2",
        "[8, 2048, 768]", "[8, 2048, 768]", "float32", "50,331,648", "yes", "48",
    ]  # fmt: skip
    memory = {row.split("  ")[0]: row.split()[-1] for row in text.splitlines() if row}
    assert memory["parameters"] == "7.63"
    assert float(memory["held"]) == pytest.approx(16 * 30.532122624 / 16, rel=0.001)
    assert "fits into 80 GB" in text


def test_the_smallest_gpu_that_is_enough():
    assert "does not fit into 40 GB" in shown(*BUILT, "device_memory=40", "world_size=8")


def test_config_json_is_enough(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    text = shown(f"base_model={tmp_path}", "max_seq_len=256", "world_size=4", "ep=2",
                 "freeze_router=true", "optimizer_in_bwd=true", "gradient_accumulation_steps=1",
                 "clip_grad_norm=null")  # fmt: skip
    gate = next(row for row in text.splitlines() if row.startswith("layers.*.mlp.router"))
    assert gate.split()[-2:] == ["no", "2"]
    assert "router: gradients" not in text
    assert "experts: rows there and back  all_to_all" in text


def test_experts_that_keep_less(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    args = (f"base_model={tmp_path}", "max_seq_len=256", "batch_size=4096",
            "enable_activation_checkpointing=true", "ac_mode=selective")  # fmt: skip

    def kept(text):
        return float(re.search(r"activations kept +([\d.]+)", text)[1])

    assert kept(shown(*args, "recompute_up=true")) < kept(shown(*args))


def test_routers_of_the_configuration(tmp_path):
    """Experts that pick tokens have no places of choices to send."""
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    args = (f"base_model={tmp_path}", "max_seq_len=256", "world_size=4", "ep=2",
            "ep_dispatcher=all_gather")  # fmt: skip

    def calls(text):
        row = next(r for r in text.splitlines() if r.startswith("experts: counts and places"))
        return int(re.search(r"ep 2 +(\d+) ", row)[1])

    layers, forwards = 2, 2 * 2  # two micro-batches, each recomputed
    assert calls(shown(*args)) == 3 * layers * forwards
    picking = "router={_component_: moe_builders.routers.ExpertChoiceTopKRouter}"
    assert calls(shown(*args, picking)) == 2 * layers * forwards


def test_mistakes_are_sentences(tmp_path):
    with pytest.raises(InputError, match=r"it has no config.json$"):
        shown(f"base_model={tmp_path}")
    with pytest.raises(InputError, match=r"^there is no model: set base_model to"):
        shown("~base_model")
    with pytest.raises(InputError, match=r"^ep is 3, but must divide the number of processes"):
        shown(*BUILT, "ep=3")
    with pytest.raises(InputError, match=r"is a Hugging Face folder, .*: leave model out"):
        shown(f"base_model={tmp_path}", BUILT[1])
    with pytest.raises(
        InputError, match=r"^max_seq_len is 1000000, but the model takes 40960 tokens"
    ):
        shown(*BUILT, "max_seq_len=1000000")


@pytest.mark.parametrize(
    ("override", "limit"),
    [("world_size=0", "at least 1"), ("world_size=-8", "at least 1"), ("node_size=0", "at least 1"),
     ("device_memory=0", "above 0"), ("state_bytes=-2", "at least 0")],
)  # fmt: skip
def test_numbers_that_no_machine_has(override, limit):
    key, value = override.split("=")
    with pytest.raises(InputError, match=rf"^{key} is {value}(\.0)?, but must be {limit}"):
        shown(*BUILT, override)
