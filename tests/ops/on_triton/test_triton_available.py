"""Who asks whether there are kernels does not import Triton."""

import ast
from pathlib import Path

import pytest
import torch

from moe_builders.ops import triton as kernels

# what is looked at, and what comes out
CASES = [
    ("cuda", True, True, (9, 0), True),
    ("cuda", True, True, (8, 0), True),
    ("cuda", True, True, (7, 5), False),
    ("cuda", True, False, (9, 0), False),
    ("cuda", False, True, (9, 0), False),
    ("cpu", True, True, (9, 0), False),
]


@pytest.mark.parametrize(("device", "gpu", "triton", "capability", "wanted"), CASES)
def test_kernels_need_a_gpu_and_triton(monkeypatch, device, gpu, triton, capability, wanted):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    found = object() if triton else None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    assert kernels.available(torch.device(device)) is wanted


def test_nothing_else_needs_triton_to_be_imported():
    package = Path(__file__).parents[3] / "moe_builders"
    folder = package / "ops" / "triton"
    named = {f"moe_builders.ops.triton.{path.stem}" for path in folder.glob("[!_]*.py")}
    for path in package.rglob("*.py"):
        if path.parent == folder and path.name != "__init__.py":
            continue
        for node in ast.parse(path.read_text()).body:  # what runs when a file is imported
            if isinstance(node, ast.Import):
                found = {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                found = {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
            else:
                continue
            assert not found & named, path
            assert "triton" not in {str(name).split(".")[0] for name in found}, path
