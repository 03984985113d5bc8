"""Run the parity and recipe tests of every family; README's support table from their results.

    python tests/support_table.py

writes tests/results/families.json and the block between the families marks of README.md.
"""

import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from moe_builders.families import BY_MODEL_TYPE

ROOT = Path(__file__).parents[1]
FAMILIES = "moe_builders.families."
RESULTS = ROOT / "tests" / "results" / "families.json"
README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- families:begin -->\n).*?(<!-- families:end -->)", re.DOTALL)
TESTS = ("tests/parity", "tests/recipes/test_families.py")
# test (file, function) -> column; the first pattern that fits counts
CHECKS = {
    r"parity\.test_logits test_logits": "logits",
    r"parity\.test_logits test_gradients": "gradients",
    r"parity\.test_round_trip .*": "round trip",
    r"parity\.test_padding_packing test_packed.*": "packing",
    r"parity\.test_padding_packing .*": "padding",
    r"parity\.test_bf16 .*": "bf16",
    r"recipes\.test_families .*": "recipe",
}
NAMES = tuple(dict.fromkeys(CHECKS.values()))


def read_report(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """pytest's XML -> model_type -> check -> how many passed, failed, were skipped; worst error."""
    families: dict[str, dict[str, dict[str, Any]]] = {}
    for test in ElementTree.parse(path).iter("testcase"):
        function, _, identity = test.get("name", "").partition("[")
        place = f"{test.get('classname', '')} {function}"
        found = [column for pattern, column in CHECKS.items() if re.search(pattern + "$", place)]
        family = next((p for p in identity.rstrip("]").split("-") if p in BY_MODEL_TYPE), None)
        if not found or family is None:
            continue
        entry = families.setdefault(family, {}).setdefault(
            found[0], {"passed": 0, "failed": 0, "skipped": 0}
        )
        failed = test.find("failure") is not None or test.find("error") is not None
        skipped = test.find("skipped") is not None
        entry["failed" if failed else "skipped" if skipped else "passed"] += 1
        for item in test.iter("property"):
            if item.get("name") == "error":
                error = float(item.get("value", "nan"))
                entry["largest_error"] = max(entry.get("largest_error", 0.0), error)
    return families


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown: one row a family, with every model_type that is built by it."""
    head = ("family", "`model_type`", "logits max\\|Δ\\|", "gradients", "round trip",
            "padding / packing", "bf16", "recipe")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, also in _rows(results["families"]):
        checks = results["families"].get(name, {})
        padding = _cell(checks, "padding", "passes")
        packing = _cell(checks, "packing", "passes")
        cells = (
            _title(name),
            ", ".join(f"`{kind}`" for kind in (name, *also)),
            _cell(checks, "logits", "{:.1e}"),
            _cell(checks, "gradients", "{:.1e}"),
            _cell(checks, "round trip", "bit-equal"),
            padding if padding == packing else f"{padding} / {packing}",
            _cell(checks, "bf16", "{:.2f}×"),
            _cell(checks, "recipe", "passes"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return "\n".join([*lines, "", f"Made by `make support-table` with {versions}.", ""])


def _rows(families: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """(model_type with results of its own, those of the same file that have none)."""
    rows: dict[str, list[str]] = {}
    alone = []
    for name in sorted(BY_MODEL_TYPE):
        if name in families:
            rows.setdefault(family_file(name), []).append(name)
        else:
            alone.append(name)
    also: dict[str, list[str]] = {}
    for name in alone:
        own = rows.get(family_file(name), [name])[0]
        also.setdefault(own, []).extend([] if own == name else [name])
    shown = {*families, *also} & BY_MODEL_TYPE.keys()
    return [(name, also.get(name, [])) for name in sorted(shown)]


def family_file(name: str) -> str:
    """The file of ``families/`` that a model_type stands in; several may share one."""
    modules = [module for key, module in sys.modules.items() if key.startswith(FAMILIES)]
    holds = (m.__name__ for m in modules if BY_MODEL_TYPE[name] in vars(m).values())
    return next(holds)


def _title(name: str) -> str:
    document = sys.modules[family_file(name)].__doc__ or name
    return document.partition(":")[0]


def _cell(checks: Mapping[str, Any], column: str, passes: str) -> str:
    entry = checks.get(column)
    if entry is None or not entry["passed"] + entry["failed"]:
        return "not run"
    if entry["failed"]:
        return f"FAILS {entry['failed']} of {entry['passed'] + entry['failed']}"
    text = passes.format(entry["largest_error"]) if "{" in passes else passes
    return f"{text}, {entry['skipped']} skipped" if entry["skipped"] else text


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def main() -> int:
    """Run the tests, write both files; pytest's exit code."""
    changed = _git("status", "--porcelain", "--", "moe_builders", "recipes", "tests/parity")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        tests = [name for name in TESTS if (ROOT / name).exists()]
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-m", "not full", f"--junitxml={report}",
             "-o", "junit_family=xunit1", *tests],  # the one that may hold what a test records
            cwd=ROOT,
        )  # fmt: skip
        families = read_report(report)
    results = {
        "commit": _git("rev-parse", "--short", "HEAD") + (" with changes" if changed else ""),
        "versions": {n: importlib.metadata.version(n) for n in ("torch", "transformers")},
        "families": {
            name: {check: checks[check] for check in NAMES if check in checks}
            for name, checks in sorted(families.items())
        },
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    text, count = BLOCK.subn(lambda m: m[1] + table(results) + m[2], README.read_text())
    if count != 1:
        raise SystemExit("README.md needs one pair of families:begin and families:end marks")
    README.write_text(text)
    return run.returncode


if __name__ == "__main__":
    raise SystemExit(main())
