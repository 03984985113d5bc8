"""Kernels compiled for a Hopper GPU without one: ``python helpers_compiled.py``, as a test does.

A program of its own, since Triton decides when it is imported whether it interprets. It prints a
JSON object: for each kernel the widths of its loads and stores in bytes, its registers, how many
bytes of them did not fit, and atomics.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_builders.ops.triton import activations, cross_entropy, rows, sort

HOPPER = GPUTarget("cuda", 90, 32)
PTXAS = Path(triton.backends.nvidia.__file__).parent / "bin" / "ptxas"
INDICES = ("token_ptr", "slot_ptr", "order_ptr", "expert_ptr", "labels_ptr")
NUMBERS = ("weights_ptr", "weights_grad_ptr", "factor_ptr", "losses_ptr")
COUNTS = ("rank_ptr", "table_ptr", "ends_ptr", "counts_ptr", "live_ptr")


def type_of(name: str) -> str:
    """Of an argument, by its name: as the launchers pass it in bf16."""
    if not name.endswith("_ptr"):
        return "fp32" if name in ("limit", "alpha", "shift") else "i32"
    if name in INDICES:
        return "*i64"
    if name in COUNTS:
        return "*i1" if name == "live_ptr" else "*i32"
    return "*fp32" if name in NUMBERS else "*bf16"


def compiled(kernel, constants: dict, *, warps: int = 4, **types: str) -> dict:
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, type_of(n)) for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n].startswith("*") or n == "stride"
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    ptx = triton.compile(source, target=HOPPER, options={"num_warps": warps}).asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [PTXAS, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    widths = {"ld": set(), "st": set()}
    for way, vector, bits in re.findall(r"(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfu](\d+)", ptx):
        widths[way].add(int(vector or 1) * int(bits) // 8)
    return {
        "reads": sorted(widths["ld"]),
        "writes": sorted(widths["st"]),
        "registers": int(re.findall(r"Used (\d+) registers", said)[0]),
        "spilled": sum(int(n) for n in re.findall(r"(\d+) bytes spill", said)),
        "atomics": re.findall(r"\b(?:atom|red)\.[\w.:]+", ptx),
    }


def main() -> None:
    found, row = {}, {"WEIGHTED": True, "COLUMNS": 256}
    for d in (2880, 1416):  # the last a multiple of 8 only
        found[f"take {d}"] = compiled(
            rows._take_kernel, row | {"D": d, "ROWS": 16, "GATHERED": True}
        )
        found[f"sum {d}"] = compiled(rows._sum_kernel, row | {"D": d, "ROWS": 8, "K": 8})
    width = {"WIDTH": 2048, "ROWS": 8, "COLUMNS": 256}
    found["products"] = compiled(rows._product_kernel, width, out_ptr="*fp32")
    added = width | {"WIDTH": 1416, "STRIDE": 1416, "E": 128, "ENDS": 128, "WEIGHTED": True}
    found["add"] = compiled(rows._add_kernel, added)
    found["tail"] = compiled(rows._tail_kernel, {"WIDTH": 2048, "COLUMNS": 1024})
    row_of_logits = {"V": 151936, "IGNORED": -100, "LEARNS": True, "COLUMNS": 4096}
    for dtype in ("bf16", "fp32"):
        found[f"softmax {dtype}"] = compiled(
            cross_entropy._softmax_kernel, row_of_logits, warps=8, logits_ptr=f"*{dtype}"
        )
    sized = {"E": 128, "HAS_LIVE": True, "TILE": 128}
    found["rank"] = compiled(sort._rank_kernel, sized | {"CHUNK": 32})
    found["place"] = compiled(sort._place_kernel, sized | {"K": 8})
    for curve, gated, clamped in (
        ("silu", True, True),
        ("gelu", True, False),
        ("gelu_tanh", True, False),
        ("relu2", False, False),
    ):
        form = row | {"H": 768, "CURVE": curve, "GATED": gated, "CLAMPED": clamped, "ROWS": 4}
        for way in ("forward", "backward"):
            kernel = getattr(activations, f"_{way}_kernel")
            found[f"{way} {curve}"] = compiled(kernel, form)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
