"""Which files the house tests look at."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]


def python_files(folder):
    return sorted(path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py"))


def config_files():
    folders = ("configs", "examples")
    return sorted(p.relative_to(ROOT) for f in folders for p in (ROOT / f).rglob("*.yaml"))


def hf_config_of(base_model):
    """The released config.json of the folder a config starts from."""
    name = Path(base_model).name
    if name == "base":  # the demo writes its own
        from python_stdlib.prepare import base_config

        return base_config(vocab_size=4096)
    return json.loads((ROOT / "tests/assets/configs" / f"{name}.json").read_text())
