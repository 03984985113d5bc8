"""One MoE layer, forward and forward + backward: ours beside others, and beside the hardware.

    python benchmarks/moe_layer.py                         # three small shapes, on the CPU
    python benchmarks/moe_layer.py --device cuda           # five released sizes; ends in 9 minutes
    python benchmarks/moe_layer.py --shapes tiny --tokens 64 --repeats 2       # does it run?

All ways get the same weights, tokens and choices (``layer_ways.py``), live in one process and are
called in turn, every second round backwards. Before a shape is timed, every way's answer and
gradients are compared with a loop in higher precision, on other tokens and ragged choices.

README.md beside this file says how to read what comes out.
"""

import argparse
import gc
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from layer_ways import (
    OWN,
    WAYS,
    NotHere,
    Problem,
    Size,
    Way,
    draw_ids,
    error_of,
    make_problem,
    reference,
    with_ids,
)
from limits import limit_seconds
from measuring import Deadline, circumstances, leave_out, peak_rates, save, saved_bytes, seconds_of

from moe_builders.metrics import max_violation

PUBLIC = {
    "mixtral_8x7b": Size(4096, 14336, 8, 2),
    "qwen3_30b_a3b": Size(2048, 768, 128, 8),
    "deepseek_v2_lite": Size(2048, 1408, 64, 6),  # its routed experts
    "olmoe_1b_7b": Size(2048, 1024, 64, 8),
    "gpt_oss_20b": Size(2880, 2880, 32, 4),  # with SwiGLU and without biases
}
SMALL = {  # those of train_step.py
    "e8_k2": Size(512, 1024, 8, 2),
    "e64_k8": Size(512, 256, 64, 8),
    "e64_k6": Size(512, 256, 64, 6),
}
TINY = {"tiny": Size(64, 32, 8, 2)}  # a trial of this script, not a measurement
SHAPES = PUBLIC | SMALL | TINY
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUTINGS = ("uniform", "zipf", "balanced")
PASSES = ("forward", "both")
GATE_TOKENS = 253  # ragged: no multiple of anything
# largest error over the largest number; bf16: of others, whose arithmetic is theirs
LIMITS = {"fp32": 1e-5, "bf16": 3e-2}
# ours in bf16 may be so much further off than the plain way, which rounds as the products do
AS_PLAIN = 1.5


class Wrong(SystemExit):
    """A way that does not compute the layer: nothing of it may be timed."""


def build_ways(names: list[str], problem: Problem) -> tuple[dict[str, Way], dict[str, str]]:
    """Those that can be built and run once, and why the others cannot."""
    ways, left_out = {}, {}
    for name in names:
        try:
            way = WAYS[name](problem)
            way.both()
            way.clear()
        except NotHere as reason:
            left_out[name] = str(reason)
        except torch.OutOfMemoryError as error:
            left_out[name] = f"out of memory: {_first_line(error)}"
        except (RuntimeError, TypeError, NotImplementedError) as error:
            if name in OWN:
                raise
            left_out[name] = f"it fails here: {_first_line(error)}"
        else:
            ways[name] = way
    return ways, left_out


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def check_ways(names: list[str], problem: Problem, dtype: str) -> dict[str, float]:
    """Errors of all ways that can be compared, on ragged choices with idle experts.

    Raises:
        Wrong: one of them is further off than it may be.
    """
    ids = draw_ids(problem.size, GATE_TOKENS, "ragged", seed=7)
    small = with_ids(problem, ids, seed=7)
    gpu = problem.x.device.type == "cuda"  # large weights, and slow in fp64
    wanted = reference(small, torch.float32 if gpu and dtype == "bf16" else torch.float64)
    ways, _ = build_ways(names, small)
    errors = {name: error_of(way, wanted) for name, way in ways.items() if way.same}
    for name, error in errors.items():
        limit = LIMITS[dtype]
        if dtype == "bf16" and name in OWN and "plain" in errors:
            limit = min(limit, AS_PLAIN * errors["plain"] + 1e-3)
        if not error <= limit:  # NaN is not
            raise Wrong(f"{name} does not compute the layer: off by {error:.3g}, of {limit:.3g}")
    return errors


def measure(
    ways: dict[str, Way], device: torch.device, *, repeats: int, share: float, deadline: Deadline
) -> dict[str, dict[str, list[float]]]:
    """Seconds of both passes, all ways in turn.

    Args:
        ways: built.
        device: where.
        repeats: rounds; a slow way takes part in fewer, at least three.
        share: seconds that one way may take.
        deadline: no round begins after it.
    """
    rounds, found = {}, {name: {each: [] for each in PASSES} for name in ways}
    for name, way in ways.items():
        once = 0.0
        for _ in range(2):  # the first one compiles and fills caches
            once = seconds_of(way.both, device) + seconds_of(way.forward, device)
            way.clear()
        rounds[name] = min(repeats, max(3, int(share / max(once, 1e-6))))
    for number in range(repeats):
        for name in list(ways) if number % 2 == 0 else list(ways)[::-1]:
            if number >= rounds[name] or (deadline.left == 0 and number > 0):
                continue
            way = ways[name]
            found[name]["forward"].append(seconds_of(way.forward, device))
            found[name]["both"].append(seconds_of(way.both, device))
            way.clear()  # outside of what is timed
    return found


def summary(
    name: str, way: Way, seconds: dict[str, list[float]], case: dict[str, Any]
) -> dict[str, Any]:
    """What the table shows of a way."""
    found: dict[str, Any] = {"saved_bytes": case["saved"].get(name)}
    for each in PASSES:
        own = statistics.median(seconds[each])
        row: dict[str, Any] = {
            "ms": 1e3 * own, "ms_range": [1e3 * min(seconds[each]), 1e3 * max(seconds[each])],
            "ratio_to_bare": own / case["bare"][each] if case["bare"] else None,
        }  # fmt: skip
        if way.products:
            row |= {
                "tflops": case["flops"][each] / own / 1e12,
                "share_of_limit": case["limit"][each] / own,
            }
        found[each] = row
    return found


def run_case(
    shape: str, tokens: int, routing: str, dtype: str, args: argparse.Namespace,
    rates: dict[str, float], errors: dict[tuple[str, str], dict[str, float]], deadline: Deadline,
) -> dict[str, Any]:  # fmt: skip
    """One shape, number of tokens, routing and dtype."""
    device, size = torch.device(args.device), SHAPES[shape]
    ids = draw_ids(size, tokens, routing)
    problem = make_problem(size, ids, dtype=DTYPES[dtype], device=device)
    if (shape, dtype) not in errors:
        errors[shape, dtype] = check_ways(args.ways, problem, dtype)
    ways, left_out = build_ways(args.ways, problem)
    saved = {
        name: saved_bytes(way.forward, way.parameters) for name, way in ways.items() if way.leaves
    }
    seconds = measure(
        ways, device, repeats=args.repeats, share=args.seconds_per_way, deadline=deadline
    )
    bares = [name for name in ("bare", "bare_own") if name in seconds]
    passes = dict(zip(PASSES, (False, True), strict=True))
    case: dict[str, Any] = {
        "saved": saved,
        "flops": {each: size.flops(tokens, backward=back) for each, back in passes.items()},
        "limit": {
            each: limit_seconds(
                size, tokens, item=DTYPES[dtype].itemsize, backward=back, rates=rates
            )
            for each, back in passes.items()
        },
        # the faster of the two
        "bare": {
            each: min(statistics.median(seconds[name][each]) for name in bares) for each in PASSES
        } if bares else {},
    }  # fmt: skip
    load = torch.bincount(ids.flatten(), minlength=size.experts)
    return {
        "shape": shape, "tokens": tokens, "routing": routing, "dtype": dtype,
        "max_violation": float(max_violation(load)), "idle_experts": int((load == 0).sum()),
        "limit_ms": {each: 1e3 * value for each, value in case["limit"].items()},
        "left_out": left_out, "errors": errors[shape, dtype],
        "ways": {name: summary(name, way, seconds[name], case) for name, way in ways.items()},
        "seconds": seconds,
    }  # fmt: skip


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, a row a way."""
    head = ("shape", "t", "routing", "dtype", "way", "fwd ms", "f+b ms", "f+b range", "TFLOP/s",
            "of limit", "× bare", "saved MiB")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for case in results:
        for name, row in case["ways"].items():
            both = row["both"]
            low, high = both["ms_range"]
            cells = (
                case["shape"], case["tokens"], case["routing"], case["dtype"], name,
                f"{row['forward']['ms']:.2f}", f"{both['ms']:.2f}", f"{low:.2f}–{high:.2f}",
                _shown(both.get("tflops"), "{:.2f}" if case["tokens"] < 4096 else "{:.0f}"),
                _shown(both.get("share_of_limit"), "{:.0%}"),
                _shown(both["ratio_to_bare"], "{:.2f}"),
                "–" if row["saved_bytes"] is None else f"{row['saved_bytes'] / 2**20:.1f}",
            )  # fmt: skip
            lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def cases_of(args: argparse.Namespace) -> list[tuple[str, int, str, str]]:
    """In the order of what is worth most, should time run out: every shape once, then more."""
    return [
        (shape, tokens, routing, dtype)
        for dtype in args.dtypes for routing in args.routings for tokens in args.tokens
        for shape in args.shapes
    ]  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line; what is not given follows from the device."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--routings", nargs="+", default=list(ROUTINGS), choices=ROUTINGS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--repeats", type=int, default=15, help="rounds")
    parser.add_argument(
        "--seconds-per-way", type=float, help="in one case; slow ways: fewer rounds"
    )
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--minutes", type=float, help="then stop; default on a GPU: 8.5")
    parser.add_argument("--out", type=Path, help="default: results/moe_layer_DEVICE.json")
    args = parser.parse_args(argv)
    gpu = args.device == "cuda"
    args.shapes = args.shapes or list(PUBLIC if gpu else SMALL)
    args.tokens = args.tokens or ([16384, 32768, 4096] if gpu else [2048])
    args.dtypes = args.dtypes or (["bf16"] if gpu else ["fp32", "bf16"])
    args.minutes = args.minutes or (8.5 if gpu else None)
    args.seconds_per_way = args.seconds_per_way or (1.0 if gpu else 5.0)
    for name in ("repeats", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, but must be at least 1")
    if min(args.tokens) < 1:
        parser.error(f"--tokens holds {min(args.tokens)}, but must be at least 1")
    args.out = args.out or Path(__file__).parent / f"results/moe_layer_{args.device}.json"
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure what was chosen, save after each case, print the table at the end."""
    args = parse(argv)
    deadline = Deadline(args.minutes)
    torch.set_num_threads(args.threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    device, tiny = torch.device(args.device), args.shapes == ["tiny"]
    report: dict[str, Any] = circumstances(device, args.threads)
    rates = {each: peak_rates(device, DTYPES[each], tiny=tiny) for each in args.dtypes}
    report |= {"command": " ".join(sys.argv), "rates": rates, "results": [], "skipped": []}
    errors: dict[tuple[str, str], dict[str, float]] = {}
    took: dict[str, float] = {}  # seconds of a shape's longest case
    for case in cases_of(args):
        name, dtype = " ".join(str(part) for part in case), case[3]
        if deadline.left <= took.get(case[0], 0.0) and took:
            leave_out(report, f"{name}: the {args.minutes:g} minutes are over")
            continue
        print(f"measuring {name}", flush=True)
        started = time.perf_counter()
        try:
            found = run_case(*case, args, rates[dtype], errors, deadline)
        except torch.OutOfMemoryError as error:
            leave_out(report, f"{name}: out of memory: {_first_line(error)}")
            continue
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        took[case[0]] = max(took.get(case[0], 0.0), time.perf_counter() - started)
        for way, reason in found["left_out"].items():
            leave_out(report, f"{name} {way}: {reason}")
        report["results"].append(found)
        save(report, args.out)
    save(report, args.out)
    print(table(report["results"]))
    print(f"every timing is in {args.out}")


if __name__ == "__main__":
    main()
