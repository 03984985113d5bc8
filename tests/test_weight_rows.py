"""Each kind of row against numbers written by hand, in random sizes and shards, and on ranks."""

import dataclasses
import math
import random
import tempfile

import pytest
import torch
from helpers_train import on_ranks
from helpers_weights import Parameters, Recorder, cut, load_in_boxes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moe_builders.checkpoint import stream, taking
from moe_builders.checkpoint.folder import SINGLE_NAME, TensorFolder
from moe_builders.errors import InputError
from moe_builders.hf_rows import FURTHER_LAYERS
from moe_builders.pieces import Piece, split, tiled
from moe_builders.weights import (
    Copy,
    Interleave,
    PassThrough,
    Rename,
    Split,
    Stack,
    Transpose,
    Unsqueeze,
    carried_names,
    make_plan,
)

HALVES = Interleave("h.{l}.gate_up", "layers.{l}.gate_up", transposed=True)
# name: row, {our name: values}, values on disk
BY_HAND = {
    "unsqueeze": (
        Unsqueeze("h.{l}.bias", "layers.{l}.bias"),
        {"layers.3.bias": [11, 12, 13, 14]},
        {"h.3.bias": [[11, 12, 13, 14]]},
    ),
    "transpose": (
        Transpose("h.{l}.down", "layers.{l}.down"),
        {"layers.3.down": [[[11, 12, 13], [14, 15, 16]], [[21, 22, 23], [24, 25, 26]]]},
        {"h.3.down": [[[11, 14], [12, 15], [13, 16]], [[21, 24], [22, 25], [23, 26]]]},
    ),
    "interleave, transposed": (
        HALVES,
        {  # 2 experts, 2 gate rows and 2 up rows of 4
            "layers.3.gate_up": [
                [[11, 12, 13, 14], [15, 16, 17, 18], [21, 22, 23, 24], [25, 26, 27, 28]],
                [[31, 32, 33, 34], [35, 36, 37, 38], [41, 42, 43, 44], [45, 46, 47, 48]],
            ]
        },
        {  # columns gate, up, gate, up
            "h.3.gate_up": [
                [[11, 21, 15, 25], [12, 22, 16, 26], [13, 23, 17, 27], [14, 24, 18, 28]],
                [[31, 41, 35, 45], [32, 42, 36, 46], [33, 43, 37, 47], [34, 44, 38, 48]],
            ]
        },
    ),
    "interleave": (
        Interleave("h.{l}.gate_up", "layers.{l}.gate_up"),
        {"layers.3.gate_up": [[[11, 12], [13, 14], [21, 22], [23, 24]]]},
        {"h.3.gate_up": [[[11, 12], [21, 22], [13, 14], [23, 24]]]},
    ),
    "interleave, a bias": (
        Interleave("h.{l}.bias", "layers.{l}.bias"),
        {"layers.3.bias": [[11, 12, 21, 22], [31, 32, 41, 42]]},
        {"h.3.bias": [[11, 21, 12, 22], [31, 41, 32, 42]]},
    ),
    "split": (
        Split("h.{l}.in", ("layers.{l}.w1", "layers.{l}.w3")),
        {"layers.3.w3": [[31, 32]], "layers.3.w1": [[11, 12], [13, 14]]},
        {"h.3.in": [[11, 12], [13, 14], [31, 32]]},
    ),
    "stack": (
        Stack("h.{l}.{e}.{gate,up}", "layers.{l}.gate_up"),
        {"layers.3.gate_up": [[[11, 12], [21, 22]], [[31, 32], [41, 42]]]},
        {"h.3.0.gate": [[11, 12]], "h.3.0.up": [[21, 22]],
         "h.3.1.gate": [[31, 32]], "h.3.1.up": [[41, 42]]},
    ),
    "a copy": (
        (Rename("embed", "tok"), Copy("head", "tok")),
        {"tok": [[1, 2], [3, 4]]},
        {"embed": [[1, 2], [3, 4]], "head": [[1, 2], [3, 4]]},
    ),
}  # fmt: skip


def tensors(values):
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}


@pytest.mark.parametrize("kind", BY_HAND)
def test_by_hand(tmp_path, kind):
    rows, ours, disk = BY_HAND[kind]
    rows, ours, disk = rows if isinstance(rows, tuple) else (rows,), tensors(ours), tensors(disk)
    save_file(disk, tmp_path / SINGLE_NAME)
    folder = TensorFolder(tmp_path)
    model = Parameters({name: tuple(value.shape) for name, value in ours.items()})
    plan = make_plan(rows, stream.model_shapes(model))
    stream.check_complete(plan, folder.entries, tmp_path)
    stream.load_pieces(model, plan, folder)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in ours.items())
    dtypes = dict.fromkeys(disk, torch.bfloat16)
    taken = taking.take_pieces(model, plan, dtypes)([list(disk)])
    assert list(taken) == list(disk)
    assert all(taken[name].is_contiguous() for name in disk)
    assert all(torch.equal(taken[name], value.bfloat16()) for name, value in disk.items())


def test_pieces_by_hand():
    assert make_plan([HALVES], {"layers.3.gate_up": (2, 6, 5)}) == [
        Piece("h.3.gate_up", "layers.3.gate_up", (0, 0, 0), (2, 3, 5), (2, 5, 6),
              (0, 0, 0), (1, 1, 2), (0, 2, 1)),
        Piece("h.3.gate_up", "layers.3.gate_up", (0, 3, 0), (2, 3, 5), (2, 5, 6),
              (0, 0, 1), (1, 1, 2), (0, 2, 1)),
    ]  # fmt: skip
    up = make_plan([HALVES], {"layers.3.gate_up": (2, 6, 5)})[1]
    assert up.span == (slice(0, 2), slice(0, 5), slice(1, 6))
    part = up.within((1, 4, 2), (3, 9, 2))  # rows 1 and 2 of up, columns 2 and 3, expert 1
    assert part == Piece("h.3.gate_up", "layers.3.gate_up", (0, 0, 0), (1, 2, 2), (2, 5, 6),
                         (1, 2, 3), (1, 1, 2), (0, 2, 1))  # fmt: skip
    assert part.span == (slice(1, 2), slice(2, 4), slice(3, 6))
    assert up.within((0, 0, 0), (2, 3, 5)) is None


def test_what_tiles_a_tensor():
    a, b, c = split("h", {"a": (2, 3), "b": (1, 3), "c": (2, 3)})
    assert tiled([a, b, c])
    assert tiled([c, a, b])
    assert not tiled([a, b])  # too little
    assert not tiled([a, b, c, c])  # too much
    assert not tiled([a, b, a])  # as many elements, some of them twice
    assert not tiled([a, b, dataclasses.replace(c, shape=(5, 4))])
    assert not tiled([a, b, dataclasses.replace(c, start=(4, 0))])  # past the end
    assert not tiled([a, b, dataclasses.replace(c, start=(3, -1))])
    gate, up = make_plan([HALVES], {"layers.3.gate_up": (2, 6, 5)})
    assert tiled([gate, up])
    assert not tiled([gate, gate])
    assert not tiled([gate, dataclasses.replace(up, step=(1, 1, 1))])


ROWS = (
    Unsqueeze("h.{l}.route", "layers.{l}.route"),
    Transpose("h.{l}.down", "layers.{l}.down"),
    Transpose("h.{l}.flat", "layers.{l}.flat"),
    HALVES,
    Interleave("h.{l}.gate_up_bias", "layers.{l}.gate_up_bias"),
    Split("h.{l}.in", ("layers.{l}.w1", "layers.{l}.w3", "layers.{l}.w2")),
    Stack("h.{l}.e.{e}.{a,b,c}", "layers.{l}.stack"),
    Rename("embed", "tok"),
    Copy("head", "tok"),
)


def shapes_of(e: int, h: int, d: int, n: int) -> dict[str, tuple[int, ...]]:
    return {
        "layers.7.route": (e,),
        "layers.7.down": (e, d, h),
        "layers.7.flat": (h, d),
        "layers.7.gate_up": (e, 2 * h, d),
        "layers.7.gate_up_bias": (e, 2 * h),
        "layers.7.w1": (h, d),
        "layers.7.w2": (d, d),
        "layers.7.w3": (n, d),
        "layers.7.stack": (e, 3 * n, d),
        "tok": (n, d),
    }


def put_on_disk(ours: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the rows above say, in torch's own words."""
    layer = {name.removeprefix("layers.7."): value for name, value in ours.items()}
    halves = {name: layer[name].chunk(2, dim=1) for name in ("gate_up", "gate_up_bias")}
    disk = {
        "h.7.route": layer["route"][None],
        "h.7.down": layer["down"].mT,
        "h.7.flat": layer["flat"].T,
        "h.7.gate_up": torch.stack(halves["gate_up"], dim=2).flatten(1, 2).mT,
        "h.7.gate_up_bias": torch.stack(halves["gate_up_bias"], dim=2).flatten(1, 2),
        "h.7.in": torch.cat([layer["w1"], layer["w3"], layer["w2"]]),
        "embed": layer["tok"],
        "head": layer["tok"],
    }
    for number, matrix in enumerate(layer["stack"]):
        parts = zip("abc", matrix.chunk(3), strict=True)
        disk |= {f"h.7.e.{number}.{word}": part for word, part in parts}
    return {name: value.contiguous().clone() for name, value in disk.items()}


def distinct(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Values of which no two are the same."""
    total = sum(math.prod(shape) for shape in shapes.values())
    values = torch.randperm(total).float().split([math.prod(s) for s in shapes.values()])
    return {name: v.view(s) for (name, s), v in zip(shapes.items(), values, strict=True)}


sizes = st.integers(1, 5)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(e=sizes, h=sizes, d=sizes, n=sizes, seed=st.integers(0, 2**20))
def test_any_sizes_in_any_boxes(e, h, d, n, seed):
    dice, shapes = random.Random(seed), shapes_of(e, h, d, n)
    ours = distinct(shapes)
    disk, plan = put_on_disk(ours), make_plan(ROWS, shapes)
    assert {p.disk: p.shape for p in plan} == {n: tuple(v.shape) for n, v in disk.items()}
    with tempfile.TemporaryDirectory() as path:
        save_file(disk, f"{path}/{SINGLE_NAME}")
        model, folder = Parameters(shapes), TensorFolder(path)
        stream.check_complete(plan, folder.entries, path)
        boxes = {name: cut(shape, dice) for name, shape in shapes.items()}
        load_in_boxes(model, plan, folder, boxes)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in ours.items())
    names = list(disk)
    dice.shuffle(names)
    taken = taking.take_pieces(model, plan, dict.fromkeys(disk, torch.float32))([names])
    assert list(taken) == names
    assert all(torch.equal(taken[name], value) for name, value in disk.items())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """5 experts on 3 ranks: 2, 2, 1; of 4 rows the last rank has none."""
    folder, shapes = tmp_path_factory.mktemp("ranks"), shapes_of(5, 3, 7, 4)
    ours = distinct(shapes)
    save_file(put_on_disk(ours), folder / SINGLE_NAME)
    case = ("helpers_weights.there_and_back", ROWS, shapes, str(folder))
    return ours, on_ranks(3, {"all": case}, folder)["all"]


def test_uneven_shards_on_ranks(ranks):
    ours, found = ranks
    assert found["whole"].keys() == ours.keys()
    assert all(torch.equal(found["whole"][name], value) for name, value in ours.items())
    assert set(found["taken"]) == put_on_disk(ours).keys()
    assert found["changed"] == []


def test_ranks_read_what_they_hold_and_are_sent_what_they_lack(ranks):
    ours, found = ranks
    copy = 4 * ours["tok"].numel()  # compared, hence read as well; taken for two names
    assert found["held"] == 4 * sum(value.numel() for value in ours.values())
    assert found["read"] == found["held"] + copy
    assert 0.3 * found["held"] < found["received"] < found["held"] + copy


def test_what_lies_apart_is_read_apart(tmp_path):
    """Last gate row and first up row are 197 columns apart on disk; all else is read once."""
    shapes = {"layers.7.gate_up": (1, 200, 2)}
    ours = distinct(shapes)
    columns = torch.stack(ours["layers.7.gate_up"].chunk(2, dim=1), dim=2).flatten(1, 2)
    save_file({"h.7.gate_up": columns.mT.contiguous()}, tmp_path / SINGLE_NAME)
    model, folder = Parameters(shapes), Recorder(tmp_path)
    for rows, reads in [((0, 200), [200]), ((99, 101), [1, 1]), ((0, 10), [19])]:
        folder.reads = []
        boxes = {"layers.7.gate_up": [(slice(0, 1), slice(*rows), slice(0, 2))]}
        load_in_boxes(model, make_plan([HALVES], shapes), folder, boxes)
        assert folder.reads == [("h.7.gate_up", 4 * 2 * columns) for columns in reads]
        assert torch.equal(model.state_dict()["layers.7.gate_up"], ours["layers.7.gate_up"])


@pytest.mark.parametrize("row", [HALVES, Transpose("h.{l}.gate_up", "layers.{l}.gate_up")])
def test_matrices_of_more_than_a_strip(tmp_path, row):
    shapes = {"layers.7.gate_up": (2, 300, 131)}
    (ours,) = distinct(shapes).values()
    turned = torch.stack(ours.chunk(2, dim=1), dim=2).flatten(1, 2) if row is HALVES else ours
    disk = {"h.7.gate_up": turned.mT.contiguous()}
    save_file(disk, tmp_path / SINGLE_NAME)
    model, plan = Parameters(shapes), make_plan([row], shapes)
    stream.load_pieces(model, plan, TensorFolder(tmp_path))
    assert torch.equal(model.state_dict()["layers.7.gate_up"], ours)
    taken = taking.take_pieces(model, plan, {"h.7.gate_up": torch.float32})([list(disk)])
    assert torch.equal(taken["h.7.gate_up"], disk["h.7.gate_up"])


def test_missing_and_wrong_shapes_are_listed(tmp_path):
    shapes = shapes_of(2, 3, 4, 5)
    disk = put_on_disk(distinct(shapes))
    disk["h.7.down"], disk["h.7.in"] = disk["h.7.down"].mT.contiguous(), disk["h.7.in"][1:]
    disk["head"], disk["h.7.route"] = disk["head"][1:], disk["h.7.route"][0]
    del disk["h.7.gate_up"]
    save_file(disk, tmp_path / SINGLE_NAME)
    plan, entries = make_plan(ROWS, shapes), TensorFolder(tmp_path).entries
    with pytest.raises(InputError) as caught:
        stream.check_complete(plan, entries, tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} does not fit the model: 1 missing: h.7.gate_up; 4 mis-shaped: "
        "h.7.route [2] instead of [1, 2], h.7.down [2, 4, 3] instead of [2, 3, 4], "
        "h.7.in [11, 4] instead of [12, 4], head [4, 4] instead of [5, 4]; take weights "
        "and config from one release"
    )


MISTAKES = {
    "a vector has no transpose": (
        [Transpose("h", "x")], {"x": (4,)}, r"x of shape \(4,\) cannot be transposed"
    ),
    "no halves": (
        [HALVES], {"layers.1.gate_up": (2, 3, 4)},
        r"layers\.1\.gate_up of shape \(2, 3, 4\) cannot be cut into 2 .*Interleave\(disk='h\.",
    ),
    "a vector has no second dim": ([Interleave("h", "x")], {"x": (4,)}, r"x of .*cannot be cut"),
    "parts of different widths": (
        [Split("h", ("x", "y"))], {"x": (4, 2), "y": (3, 3)}, r"h cannot be .* x \(4, 2\), y \(3,"
    ),
    "a part the model lacks": (
        [Split("h.{l}", ("{l}.x", "{l}.y"))], {"1.x": (4,)}, r"finds 1\.x, but .* has no 1\.y"
    ),
    "only later parts": ([Split("h", ("x", "y"))], {"y": (4,)}, r"no row fills y"),
    "no number to fill in": (
        [Rename("h.{l}.{k}", "x.{l}")], {"x.1": (4,)}, r"does not say what h\.1\.\{k\} is for x\.1"
    ),
    "experts on disk, none in the row": (
        [Transpose("h.{e}", "x")], {"x": (2, 3, 4)}, r"does not say what h\.\{e\} is for x"
    ),
    "all experts from one tensor": (
        [Stack("h", "x")], {"x": (2, 3, 4)}, r"h is not covered exactly once, but filled from x"
    ),
    "two rows for a tensor on disk": (
        [Transpose("h", "x"), Rename("h", "y")], {"x": (2, 4), "y": (4, 2)}, r"h is not .* x, y"
    ),
    "two shapes of a tensor on disk": (
        [Split("h", ("x", "y")), Rename("h", "z")], {"x": (1,), "y": (1,), "z": (2,)},
        r"h is not .* from x, y, z",
    ),
    "two rows for a parameter": (
        [Split("h", ("x", "y")), Rename("g", "y")], {"x": (1,), "y": (1,)},
        r"y is filled by more than one row, the last one Rename\(disk='g'",
    ),
    "a copy alone fills nothing": ([Copy("h", "x")], {"x": (4,)}, r"no row fills x"),
    "a copy of two": (
        [Rename("a", "x"), Rename("b", "y"), Copy("h", "x"), Copy("h", "y")],
        {"x": (4,), "y": (4,)}, r"h is a copy twice, the last time by Copy\(disk='h', ours='y'",
    ),
    "beyond no layer": (
        [Rename("a", "x"), PassThrough("h.{l}.{*}", beyond="layer.{l}.")], {"x": (4,)},
        r"needs parameters whose names begin like layer\.\{l\}\.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_rows_are_named(mistake):
    rows, shapes, words = MISTAKES[mistake]
    with pytest.raises(ValueError, match=words):
        make_plan(rows, shapes)


def test_rows_that_contradict_themselves():
    with pytest.raises(ValueError, match=r"names a parameter twice"):
        Split("h", ("x", "y", "x"))
    with pytest.raises(ValueError, match=r"both names need \{l\}"):
        PassThrough("model.mtp.{*}", beyond="layers.{l}.")


def test_rows_without_a_place_are_skipped():
    assert make_plan([*ROWS, Copy("other", "none")], {"tok": (2, 3)}) == make_plan(
        [Rename("embed", "tok"), Copy("head", "tok")], {"tok": (2, 3)}
    )


def test_what_comes_after_the_last_layer_passes():
    rows = (*FURTHER_LAYERS, PassThrough("vision_model.{*}"))
    shapes = {"layers.2.norm": (4,), "layers.10.norm": (4,), "tok": (4,)}
    passing = ["model.layers.11.a", "model.layers.11.mlp.experts.0.b.weight", "vision_model.x.0.y"]
    other = [
        "model.layers.10.a", "model.layers.3.a", "model.layers.x.a", "layers.11.a", "model.norm",
        "model.layers.11", "vision_model", "a.vision_model.x", "visionXmodel.x",
    ]  # fmt: skip
    assert carried_names(rows, shapes, [*other, *passing]) == passing
