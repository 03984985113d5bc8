"""Rows against shapes, regions worked out by hand; and load ∘ take = identity for any sharding."""

import math
import random

import pytest
import torch
from helpers_weights import Parameters, cut, load_in_boxes
from safetensors.torch import save_file

from moe_builders.checkpoint import stream, taking
from moe_builders.checkpoint.folder import SINGLE_NAME, TensorFolder
from moe_builders.families import qwen3_moe
from moe_builders.pieces import Piece
from moe_builders.weights import (
    PassThrough,
    Rename,
    Stack,
    carried_names,
    make_plan,
    own_rows,
)

ROWS = (
    Rename("embed.weight", "tok.weight"),
    Rename("h.{l}.norm", "layers.{l}.norm"),
    Rename("h.{l}.bias", "layers.{l}.bias"),  # optional: no layer below has one
    Stack("h.{l}.e.{e}.{gate,up}.weight", "layers.{l}.gate_up"),
    Stack("h.{l}.e.{e}.down.weight", "layers.{l}.down"),
    Stack("h.{l}.e.{e}.{gate,up}.bias", "layers.{l}.gate_up_bias"),
    PassThrough("mtp.{l}.w"),
)
SHAPES = {
    "tok.weight": (5, 4),
    "layers.0.norm": (4,),
    "layers.10.gate_up": (2, 6, 4),
    "layers.10.down": (2, 4, 3),
    "layers.10.gate_up_bias": (2, 6),
}


def expert(disk: str, ours: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Piece:
    """A tensor of one expert, which lacks the expert dim."""
    dims = range(len(shape))
    zeros, ones = (0,) * len(shape), (1,) * len(shape)
    return Piece(disk, ours, offset, (1, *shape), shape, zeros, ones, (None, *dims))


def test_regions_by_hand():
    assert make_plan(ROWS, SHAPES) == [
        Piece("embed.weight", "tok.weight", (0, 0), (5, 4), (5, 4), (0, 0), (1, 1), (0, 1)),
        Piece("h.0.norm", "layers.0.norm", (0,), (4,), (4,), (0,), (1,), (0,)),
        expert("h.10.e.0.gate.weight", "layers.10.gate_up", (0, 0, 0), (3, 4)),
        expert("h.10.e.0.up.weight", "layers.10.gate_up", (0, 3, 0), (3, 4)),
        expert("h.10.e.1.gate.weight", "layers.10.gate_up", (1, 0, 0), (3, 4)),
        expert("h.10.e.1.up.weight", "layers.10.gate_up", (1, 3, 0), (3, 4)),
        expert("h.10.e.0.down.weight", "layers.10.down", (0, 0, 0), (4, 3)),
        expert("h.10.e.1.down.weight", "layers.10.down", (1, 0, 0), (4, 3)),
        expert("h.10.e.0.gate.bias", "layers.10.gate_up_bias", (0, 0), (3,)),
        expert("h.10.e.0.up.bias", "layers.10.gate_up_bias", (0, 3), (3,)),
        expert("h.10.e.1.gate.bias", "layers.10.gate_up_bias", (1, 0), (3,)),
        expert("h.10.e.1.up.bias", "layers.10.gate_up_bias", (1, 3), (3,)),
    ]


def test_scalar():
    assert own_rows({"scale": ()}) == (Rename("scale", "scale"),)
    plan = make_plan(own_rows(["scale"]), {"scale": ()})
    assert plan == [Piece("scale", "scale", (), (), (), (), (), ())]


def test_a_row_matches_whole_names_only():
    with pytest.raises(ValueError, match=r"no row fills layers\.x\.norm, layers\.0\.norm\.weight"):
        make_plan(ROWS, {"layers.x.norm": (4,), "layers.0.norm.weight": (4,)})
    with pytest.raises(ValueError, match=r"no row fills layers0norm"):
        make_plan([Rename("a.b", "layers.norm"), *ROWS], {"layers0norm": (4,)})


def test_every_mistake_in_rows_is_an_error():
    with pytest.raises(ValueError, match=r"no row fills layers\.0\.norm"):
        make_plan([row for row in ROWS if "norm" not in row.disk], SHAPES)
    with pytest.raises(ValueError, match=r"layers\.0\.norm is filled by more than one row"):
        make_plan([*ROWS, Rename("n", "layers.0.norm")], SHAPES)
    with pytest.raises(
        ValueError, match=r"embed\.weight is not covered exactly once, .* tok\.weight, head"
    ):
        make_plan([*ROWS, Rename("embed.weight", "head")], SHAPES | {"head": (5, 4)})
    with pytest.raises(ValueError, match=r"layers\.0\.down of shape \(4,\) cannot be cut into 1"):
        make_plan(ROWS, {"layers.0.down": (4,)})
    with pytest.raises(ValueError, match=r"of shape \(2, 5, 4\) cannot be cut into 2 parts"):
        make_plan(ROWS, {"layers.0.gate_up": (2, 5, 4)})


def test_what_passes_through():
    other = ["mtp.12.w2", "mtp.x.w", "mtp.w", "embed.weight", "Xmtp.1.w"]
    assert carried_names(ROWS, SHAPES, ["mtp.12.w", *other]) == ["mtp.12.w"]


def test_every_element_of_a_real_model_is_covered_once():
    with torch.device("meta"):
        model = qwen3_moe.qwen3_moe(
            vocab_size=11, embed_dim=12, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=4,
            num_experts=4, experts_per_token=2, expert_hidden_dim=5, max_seq_len=8,
            attention_bias=True, intermediate_dim=7, dense_layers=(1,),
        )  # fmt: skip
    shapes = stream.model_shapes(model)
    plan = [piece for piece in make_plan(qwen3_moe.WEIGHT_MAP, shapes) if not piece.copy]
    covered = {name: torch.zeros(shape, dtype=torch.int) for name, shape in shapes.items()}
    for piece in plan:
        assert math.prod(piece.shape) == math.prod(piece.size)
        covered[piece.ours][piece.region] += 1
    assert all(count.eq(1).all() for count in covered.values())
    assert len({piece.disk for piece in plan}) == len(plan)


@pytest.mark.parametrize("seed", range(12))
def test_any_shards_loaded_one_by_one_give_back_the_folder(tmp_path, seed):
    dice = random.Random(seed)
    e, h, d = dice.randint(1, 4), dice.randint(1, 5), dice.randint(1, 5)
    shapes = SHAPES | {
        "layers.10.gate_up": (e, 2 * h, d),
        "layers.10.down": (e, d, h),
        "layers.10.gate_up_bias": (e, 2 * h),
    }
    plan = make_plan(ROWS, shapes)
    stored = {piece.disk: torch.randn(piece.shape).bfloat16() for piece in plan}
    save_file(stored, tmp_path / SINGLE_NAME)
    model, folder = Parameters(shapes), TensorFolder(tmp_path)
    boxes = {name: cut(shape, dice) for name, shape in shapes.items()}
    load_in_boxes(model, plan, folder, boxes)
    dtypes = dict.fromkeys(stored, torch.bfloat16)
    taken = taking.take_pieces(model, plan, dtypes)([list(stored)])
    assert taken.keys() == stored.keys()
    assert all(torch.equal(taken[name], stored[name]) for name in stored)
