"""The house rules that a machine can hold: budgets, no prints, configs that build, no drift."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch
from helpers_house import config_files, hf_config_of, python_files

from moe_builders.families import BY_MODEL_TYPE
from moe_builders.instantiate import instantiate
from moe_builders.training.config import RecipeConfig, load_config

ROOT = Path(__file__).parents[1]
PACKAGE_LINES, RECIPE_LINES, RECIPE_BRANCHES = 300, 450, 30
BRANCHES = (ast.If, ast.IfExp, ast.For, ast.While, ast.Try, ast.Match)


@pytest.mark.parametrize("path", python_files("moe_builders"), ids=str)
def test_package_files_are_short_and_silent(path):
    text = (ROOT / path).read_text()
    assert len(text.splitlines()) <= PACKAGE_LINES
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "the first line says what the file is for"
    calls = [n.func.id for n in ast.walk(tree)
             if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]  # fmt: skip
    if path.name != "launch.py":  # the one place that speaks to a terminal
        assert "print" not in calls
    assert "except: pass" not in re.sub(r"\s+", " ", text)


@pytest.mark.parametrize("path", python_files("recipes"), ids=str)
def test_recipes_stay_readable(path):
    text = (ROOT / path).read_text()
    assert len(text.splitlines()) <= RECIPE_LINES
    branches = sum(isinstance(node, BRANCHES) for node in ast.walk(ast.parse(text)))
    assert branches <= RECIPE_BRANCHES, branches
    assert not re.search(r"(cfg|config)\.get\(", text)


def test_recipes_is_not_a_package():
    assert not (ROOT / "recipes" / "__init__.py").exists(), "it would shadow torchtune's own"


def test_same_named_functions_in_recipes_are_the_same():
    seen: dict[str, tuple[Path, str]] = {}
    for path in python_files("recipes"):
        text = (ROOT / path).read_text()
        for node in ast.parse(text).body:
            if not isinstance(node, ast.FunctionDef):
                continue
            source = ast.get_source_segment(text, node) or ""
            if "# differs:" in source:
                continue
            other, same = seen.setdefault(node.name, (path, source))
            assert source == same, f"{node.name} differs between {other} and {path}"


def test_only_parallel_reads_the_environment_and_processes():
    for path in python_files("moe_builders"):
        text = (ROOT / path).read_text()
        if "parallel" in path.parts:
            continue
        assert "os.environ" not in text, path
        assert "torch.distributed" not in text, path


@pytest.mark.parametrize("path", python_files("moe_builders"), ids=str)
def test_no_module_takes_another_ones_private_names(path):
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moe_builders"):
            assert not [name.name for name in node.names if name.name.startswith("_")]


def test_environment_has_configs():
    assert len(config_files()) >= 3


@pytest.mark.parametrize("path", config_files(), ids=str)
def test_every_config_is_valid_and_builds_on_the_meta_device(path, monkeypatch):
    monkeypatch.chdir(ROOT / path.parent)  # a config's own module stands beside it
    config = load_config(ROOT / path)
    assert isinstance(config, RecipeConfig)
    header = (ROOT / path).read_text().splitlines()
    assert any("tune run" in line for line in header[:12]), "starts with its launch line"
    with torch.device("meta"):
        if config.model is not None:
            model = instantiate(config.model, path="model")
        else:
            released = hf_config_of(config.base_model)
            model = BY_MODEL_TYPE[released["model_type"]].build(released)
    assert sum(p.numel() for p in model.parameters()) > 1000
    assert config.max_seq_len <= model.max_seq_len


@pytest.mark.parametrize("path", config_files(), ids=str)
def test_every_component_of_a_config_exists_and_takes_its_keys(path, monkeypatch):
    from moe_builders.instantiate import _check_arguments, find_component

    monkeypatch.chdir(ROOT / path.parent)
    config = load_config(ROOT / path)
    for key in ("dataset", "dataset_val", "optimizer", "lr_scheduler", "tokenizer"):
        node = getattr(config, key)
        if node is None:
            continue
        component = find_component(node["_component_"], path=key)
        arguments = {k: v for k, v in node.items() if k != "_component_"}
        if key.startswith("dataset"):
            arguments = {
                k: v for k, v in arguments.items() if k not in ("packed", "split_across_pack")
            }
        extra = {"lr_scheduler": {"num_training_steps": 1}}.get(key, {})
        positional = () if key == "tokenizer" else (None,)
        _check_arguments(component, positional, arguments | extra, key)


def test_nothing_names_a_machine():
    for path in [*python_files("moe_builders"), *python_files("recipes"), *config_files()]:
        assert not re.search(r"/(work|root|home)/", (ROOT / path).read_text()), path


def test_released_configs_are_json_objects():
    for path in (ROOT / "tests/assets/configs").glob("*.json"):
        assert json.loads(path.read_text())["model_type"] in BY_MODEL_TYPE


def test_test_files_have_names_of_their_own():
    """pytest tells files without packages apart by their name alone."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
