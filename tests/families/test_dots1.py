"""What is dots1's own: windows by layer in two spellings, null as transformers takes it."""

import json
from pathlib import Path

import pytest
from helpers_parity import all_cases

from moe_builders.errors import InputError
from moe_builders.families.dots1 import builder_arguments, dots1

ASSETS = Path(__file__).parents[1] / "assets" / "configs"


@pytest.fixture
def released():
    return json.loads((ASSETS / "dots.llm1.inst.json").read_text())


WINDOWS = {
    "no window": ({"sliding_window": None, "max_window_layers": 60}, ()),
    "last layers": ({"sliding_window": 512, "max_window_layers": 60}, (60, 61)),
    "none of the layers": ({"sliding_window": 512}, ()),
    "named": (
        {"sliding_window": 512, "layer_types": ["sliding_attention"] + 61 * ["full_attention"]},
        (0,),
    ),
}


@pytest.mark.parametrize(("fields", "layers"), WINDOWS.values(), ids=WINDOWS)
def test_windows(released, fields, layers):
    arguments = builder_arguments(released | fields)
    assert arguments["window_layers"] == layers
    types = all_cases()["dots1"].completed(released | fields)["layer_types"]
    assert layers == tuple(n for n, kind in enumerate(types) if kind == "sliding_attention")


def test_a_window_that_is_left_out_is_that_of_transformers(released):
    config = {k: v for k, v in released.items() if k != "sliding_window"}
    arguments = builder_arguments(config | {"max_window_layers": 61})
    assert (arguments["window"], arguments["window_layers"]) == (4096, (61,))


def test_windows_without_a_width():
    with pytest.raises(InputError, match=r"layers \[1\] have a window, but window is not set"):
        dots1(
            vocab_size=8, embed_dim=8, num_layers=2, num_heads=2, num_kv_heads=2, num_experts=4,
            experts_per_token=2, expert_hidden_dim=8, shared_hidden_dim=8, intermediate_dim=8,
            max_seq_len=8, window_layers=(1,),
        )  # fmt: skip


@pytest.mark.parametrize("used", [True, False])
def test_switches_that_contradict_windows(released, used):
    """transformers does not read use_sliding_window."""
    assert builder_arguments(released | {"use_sliding_window": used}) == builder_arguments(released)
    config = released | {"sliding_window": 512, "max_window_layers": 60}
    if used:
        assert builder_arguments(config | {"use_sliding_window": used})["window_layers"]
        return
    with pytest.raises(InputError, match="use_sliding_window=False"):
        builder_arguments(config | {"use_sliding_window": used})


def test_null_in_a_hub_file(released):
    nulls = {"n_group": None, "topk_group": None, "num_key_value_heads": None, "head_dim": None}
    assert builder_arguments(released | nulls) == builder_arguments(released)


@pytest.mark.parametrize(
    "field",
    [
        {"scoring_func": "softmax"},
        {"topk_method": "greedy"},
        {"moe_layer_freq": 2},
        {"attention_dropout": 0.1},
        {"hidden_act": "gelu"},
    ],
    ids=str,
)
def test_fields_that_would_change_the_model(released, field):
    ((name, value),) = field.items()
    with pytest.raises(InputError) as raised:
        builder_arguments(released | field)
    assert f"{name}={value!r}" in str(raised.value)


def test_fields_that_change_nothing(released):
    fields = {"scoring_func": "noaux_tc", "topk_method": "noaux_tc", "moe_layer_freq": 1}
    assert builder_arguments(released | fields) == builder_arguments(released)


def test_fields_of_its_makers_trainer(released):
    inert = {"aux_loss_alpha": 0.001, "seq_aux": True, "ep_size": 1}
    assert builder_arguments(released | inert) == builder_arguments(released)
