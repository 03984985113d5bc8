"""Where parameters live, as numbers; meshes that do not fit, as sentences."""

import pytest

from moe_builders.errors import InputError
from moe_builders.parallel.plan import (
    MeshShape,
    Place,
    check_expert_parallel,
    choices,
    describe_mesh,
    place_parameters,
    sharding_plan,
)

SHAPES = {
    "tok_embeddings.weight": (100, 8),
    "layers.0.attn.q_proj.weight": (8, 8),
    "layers.0.mlp.router.gate.weight": (4, 8),
    "layers.0.mlp.experts.gate_up_proj": (4, 12, 8),
    "layers.0.mlp.experts.down_proj": (4, 8, 6),
    "layers.0.mlp.experts.down_bias": (4, 8),
    "norm.scale": (8,),
}
MODULES = ["", "tok_embeddings", "layers.0", "layers.0.attn", "layers.0.mlp.router",
           "layers.0.mlp.experts", "norm"]  # fmt: skip


def places(**axes):
    found = place_parameters(SHAPES, sharding_plan(MODULES), MeshShape(**axes))
    assert found.keys() == SHAPES.keys()
    return {name.rpartition(".")[2] if "experts" in name else name: p for name, p in found.items()}


def test_groups_by_hand():
    found = places(dp_shard=2)
    assert found["tok_embeddings.weight"] == Place("", "root", None, 0)
    assert found["layers.0.attn.q_proj.weight"] == Place("layers.0", "layer", None, 0)
    assert found["layers.0.mlp.router.gate.weight"].kind == "router"
    assert found["gate_up_proj"] == Place("layers.0.mlp.experts", "experts", None, 0)
    assert found["norm.scale"].group == ""


@pytest.mark.parametrize(
    ("axes", "ep_dim", "dims"),  # of gate_up_proj [4, 12, 8], down_proj [4, 8, 6], down_bias [4, 8]
    [
        ({"dp_shard": 3}, None, (0, 0, 0)),  # uneven: 2, 2, 0 experts
        ({"dp_shard": 4}, None, (0, 0, 0)),
        ({"dp_shard": 6}, None, (1, 2, 0)),  # 8 is no multiple: down_bias 1, 1, 1, 1, 0, 0
        ({"dp_shard": 5}, None, (0, 0, 0)),  # nothing divides
        ({"ep": 2, "dp_shard": 2}, 0, (0, 0, 0)),
        ({"ep": 4, "dp_shard": 2}, 0, (1, 1, 1)),
        ({"ep": 4, "dp_shard": 3, "dp_replicate": 2}, 0, (1, 2, 0)),
        ({"ep": 4, "dp_shard": 1}, 0, (0, 0, 0)),
    ],
)
def test_experts_are_cut_where_everyone_gets_some(axes, ep_dim, dims):
    found = places(**axes)
    got = [found[name] for name in ("gate_up_proj", "down_proj", "down_bias")]
    assert tuple(place.shard_dim for place in got) == dims
    assert {place.ep_dim for place in got} == {ep_dim}
    assert found["tok_embeddings.weight"].shard_dim == 0


def test_shards_of_a_group():
    mesh = MeshShape(dp_replicate=2, dp_shard=3, ep=4)
    assert mesh.size == 24
    assert mesh.shards("experts") == 3
    assert mesh.shards("layer") == mesh.shards("router") == mesh.shards("root") == 12
    assert MeshShape(dp_shard=3).shards("experts") == 3


def test_ep_divides_the_experts():
    check_expert_parallel(ep=4, num_experts=8, layer="layers.0.mlp.experts")
    with pytest.raises(InputError, match=r"^ep is 3, but must divide the 8 experts of layers\.0\."
                                         r"mlp\.experts: choose 1, 2, 4 or 8$"):  # fmt: skip
        check_expert_parallel(ep=3, num_experts=8, layer="layers.0.mlp.experts")


@pytest.mark.parametrize(("number", "said"), [(1, "1"), (2, "1 or 2"), (12, "1, 2, 3, 4, 6 or 12")])
def test_choices(number, said):
    assert choices(number) == said


def test_a_line_on_the_mesh():
    assert describe_mesh(MeshShape(), dispatcher="all_to_all") == []
    assert describe_mesh(MeshShape(2, 3), dispatcher="all_to_all") == [
        "6 processes: dp_replicate 2 × dp_shard 3 × ep 1"
    ]
    assert describe_mesh(MeshShape(1, 2, 4), dispatcher="all_gather") == [
        "8 processes: dp_replicate 1 × dp_shard 2 × ep 4 (all_gather)"
    ]
