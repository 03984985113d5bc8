"""What is asked for of the parameters, and that nothing larger than that is in one piece."""

import pytest
import torch
from helpers_weights import Parameters
from torch import nn

from moe_builders.checkpoint import taking
from moe_builders.checkpoint.stream import model_shapes
from moe_builders.checkpoint.taking import take_pieces
from moe_builders.parallel.boxes import box_elements
from moe_builders.weights import Interleave, Rename, Stack, make_plan

ROWS = (
    Stack("e.{e}.{gate,up}", "layers.{l}.gate_up"),
    Interleave("fused", "fused"),
    Rename("head", "head"),
    Rename("scale", "scale"),
    Rename("none", "none"),
)
SHAPES = {"layers.0.gate_up": (4, 6, 5), "fused": (3, 4, 2), "head": (20, 3), "scale": (),
          "none": (0, 3)}  # fmt: skip


@pytest.fixture
def asked(monkeypatch) -> list[list[tuple[str, int]]]:
    """Of every exchange: elements of the box that each process asks for."""
    seen, gather = [], taking.gather_wanted

    def noted(wanted):
        seen.append([0 if w is None else box_elements(w.box) for w in wanted])
        return gather([w for w in wanted if w is not None][:1])

    monkeypatch.setattr(taking, "gather_wanted", noted)
    return seen


def filled() -> tuple[nn.Module, list]:
    model = Parameters(SHAPES)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            values = 1000 * number + torch.arange(parameter.numel())
            parameter.copy_(values.view(parameter.shape))
    return model, make_plan(ROWS, model_shapes(model))


@pytest.mark.parametrize("at_once", [1, 7, 15, 30, 60, 2**26])
def test_boxes_as_large_as_fits_at_once(asked, monkeypatch, at_once):
    monkeypatch.setattr(taking, "_AT_ONCE", at_once)
    model, plan = filled()
    dtypes = {piece.disk: torch.float32 for piece in plan}
    names = [*dtypes][::-1]  # in any order
    taken = take_pieces(model, plan, dtypes)([names])
    assert list(taken) == names
    state = model.state_dict()
    for number in range(4):
        pair = torch.cat([taken[f"e.{number}.gate"], taken[f"e.{number}.up"]])
        assert torch.equal(pair, state["layers.0.gate_up"][number])
    assert torch.equal(taken["fused"][:, 0::2], state["fused"][:, :2])
    assert torch.equal(taken["fused"][:, 1::2], state["fused"][:, 2:])
    assert all(torch.equal(taken[n], state[n]) for n in ("head", "scale", "none"))
    row = 15  # the largest that is never cut: one expert's gate, or up
    assert max(size for (size,) in asked) <= max(at_once, row)
    assert sum(size for (size,) in asked) == sum(value.numel() for value in state.values())


def test_processes_that_ask_for_less_wait(asked):
    """The second wants one expert of a parameter, and the third nothing at all."""
    model, plan = filled()
    dtypes = {piece.disk: torch.bfloat16 for piece in plan}
    dealt = [["head", "e.0.gate", "e.0.up"], ["e.3.up"], []]
    taken = take_pieces(model, plan, dtypes, rank=0)(dealt)
    assert list(taken) == dealt[0]
    assert asked == [[60, 15, 0], [30, 0, 0]]
    assert torch.equal(taken["head"], model.state_dict()["head"].bfloat16())
    assert take_pieces(model, plan, dtypes, rank=2)(dealt) == {}
