"""Every Python block of README and docs runs; the configuration table is complete."""

import json
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import support_table
from helpers_train import HF_CONFIG
from omegaconf import OmegaConf

from moe_builders.families import BY_MODEL_TYPE
from moe_builders.hub import create_hf_model
from moe_builders.instantiate import find_component
from moe_builders.training.config import RecipeConfig, check_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "recipes/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}:{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "/models/" in block:  # a reader's own folder: a tiny one stands in for it
        create_hf_model(tmp_path / "models" / "tiny", HF_CONFIG, seed=0)
        block = re.sub(r"/models/[\w.-]+", str(tmp_path / "models" / "tiny"), block)
    exec(compile(block, "block", "exec"), {"__name__": "block"})


def test_yaml_blocks_are_configurations():
    """Whole ones as they are; a part is put into the rest of one."""
    whole = {"output_dir": "out", "dataset": {}, "optimizer": {}}
    seen = 0
    for page in PAGES:
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
            values = OmegaConf.create(block)
            check_config(OmegaConf.create(whole | dict(values)))  # unknown keys raise
            for node in values.values():
                if OmegaConf.is_dict(node) and "_component_" in node:
                    find_component_of_docs(node["_component_"])
            seen += 1
    assert seen >= 5


def find_component_of_docs(name):
    if not name.startswith("mymodel."):  # the reader's own
        find_component(name, path="docs")


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_configuration_key_is_in_the_table():
    table = (ROOT / "docs/configuration.md").read_text()
    named = set(re.findall(r"`([\w.]+)`", "\n".join(
        line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))))  # fmt: skip
    keys = {f.name for f in fields(RecipeConfig) if not is_dataclass(f.type)}
    for section in fields(RecipeConfig):
        if is_dataclass(section.type):
            keys |= {f"{section.name}.{f.name}" for f in fields(section.type)}
    assert named == keys


def test_support_table_is_what_the_tests_found():
    """`make support-table` writes both; the table is never typed by hand."""
    results = json.loads(support_table.RESULTS.read_text())
    block = support_table.BLOCK.search((ROOT / "README.md").read_text())
    assert block is not None
    assert block[0] == block[1] + support_table.table(results) + block[2]
    missing = [name for name in BY_MODEL_TYPE if f"`{name}`" not in block[0]]
    assert not missing
    failures = [
        f"{name}: {check}"
        for name, checks in results["families"].items()
        for check, found in checks.items()
        if found["failed"] or not found["passed"]
    ]
    assert not failures
