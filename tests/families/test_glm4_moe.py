"""What is GLM-4-MoE's own: half of each head turned where nothing is said, further layers."""

import json
from pathlib import Path

import pytest
from helpers_parity import all_cases, write_folder
from hf_helpers import rewrite
from torch import ones

from moe_builders.errors import InputError
from moe_builders.families.glm4_moe import builder_arguments
from moe_builders.hub import load_hf_model

ASSETS = Path(__file__).parents[1] / "assets" / "configs"


@pytest.fixture
def released():
    return json.loads((ASSETS / "GLM-4.5-Air.json").read_text())


@pytest.mark.parametrize(
    ("fields", "fraction"),
    [
        ({"partial_rotary_factor": 0.25}, 0.25),
        ({"partial_rotary_factor": 1.0}, 1.0),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.125}}, 0.125),
    ],
    ids=str,
)
def test_spellings_of_the_turned_part(released, fields, fraction):
    config = released | fields
    assert builder_arguments(config)["rope_fraction"] == fraction
    completed = all_cases()["glm4_moe"].completed(config)
    assert completed["rope_parameters"]["partial_rotary_factor"] == fraction


def test_half_is_turned_where_nothing_is_said(released):
    config = {k: v for k, v in released.items() if k != "partial_rotary_factor"}
    assert builder_arguments(config)["rope_fraction"] == 0.5
    completed = all_cases()["glm4_moe"].completed(config)
    assert completed["rope_parameters"]["partial_rotary_factor"] == 0.5


def test_null_is_not_half_but_all(released):
    config = released | {"partial_rotary_factor": None}
    assert builder_arguments(config)["rope_fraction"] == 1
    completed = all_cases()["glm4_moe"].completed(config)
    assert completed["rope_parameters"].get("partial_rotary_factor") is None


def test_a_tensor_inside_a_layer_does_not_pass_through(tmp_path):
    folder = write_folder(all_cases()["glm4_moe"], tmp_path)
    rewrite(folder, {"model.layers.2.eh_proj.weight": ones(64, 128)})
    with pytest.raises(InputError, match=r"model\.layers\.2\.eh_proj\.weight"):
        load_hf_model(folder)


@pytest.mark.parametrize(
    "field",
    [
        {"scoring_func": "softmax"},
        {"topk_method": "greedy"},
        {"attention_dropout": 0.1},
        {"hidden_act": "gelu"},
        {"num_experts_per_tok": 1},
    ],
    ids=str,
)
def test_fields_that_would_change_the_model(released, field):
    ((name, value),) = field.items()
    with pytest.raises(InputError) as raised:
        builder_arguments(released | field)
    assert f"{name}={value!r}" in str(raised.value)
