"""What is GLM-4.7-Flash's own: dense layers are said twice in its config.json."""

import json
from pathlib import Path

import pytest

from moe_builders.errors import InputError
from moe_builders.families.glm4_moe_lite import builder_arguments

ASSETS = Path(__file__).parents[1] / "assets" / "configs"


@pytest.fixture
def released():
    return json.loads((ASSETS / "GLM-4.7-Flash.json").read_text())


def kinds(*dense):
    return ["dense" if n in dense else "sparse" for n in range(47)]


@pytest.mark.parametrize(
    ("fields", "dense"),
    [
        ({}, (0,)),
        ({"first_k_dense_replace": None}, (0,)),
        ({"first_k_dense_replace": 2, "mlp_layer_types": kinds(0, 1)}, (0, 1)),
        ({"first_k_dense_replace": 0, "mlp_layer_types": kinds()}, ()),
        ({"first_k_dense_replace": 99, "mlp_layer_types": ["dense"] * 47}, tuple(range(47))),
    ],
    ids=str,
)
def test_both_ways_to_say_which_layers_are_dense(released, fields, dense):
    assert builder_arguments(released | fields)["dense_layers"] == dense


@pytest.mark.parametrize(
    "fields",
    [
        {"first_k_dense_replace": 3},  # transformers would build one
        {"first_k_dense_replace": 1, "mlp_layer_types": kinds(5)},
        {"first_k_dense_replace": -1},
    ],
    ids=str,
)
def test_both_must_say_the_same(released, fields):
    with pytest.raises(InputError, match="first_k_dense_replace="):
        builder_arguments(released | fields)
