"""A missing compiler is one sentence; layers keep their names."""

import pytest
import torch
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

from moe_builders.errors import InputError
from moe_builders.families.qwen3_moe import qwen3_moe_tiny
from moe_builders.training.compiling import compile_layers


def test_no_compiler_is_one_sentence(monkeypatch):
    def none_found():
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none_found)
    with torch.device("meta"):
        model = qwen3_moe_tiny()
    with pytest.raises(InputError, match=r"compile=true needs a C\+\+ compiler .*compile=false"):
        compile_layers(model.layers)


def test_names_stay():
    with torch.device("meta"):
        model = qwen3_moe_tiny()
    names = list(model.state_dict())
    compile_layers(model.layers)
    assert list(model.state_dict()) == names
