"""What Kimi-K2's files say: the model of DeepSeek-V3 under another name."""

import json

import pytest
import torch
from helpers_parity import all_cases, load_reference, write_folder
from hf_helpers import assert_equal_tensors

from moe_builders.errors import InputError
from moe_builders.families import BY_MODEL_TYPE
from moe_builders.hub import load_hf_model, save_hf_model


def renamed(config, **fields):
    return {**config, "model_type": "kimi_k2", **fields}


def test_a_folder_of_kimi_k2(tmp_path):
    case = all_cases()["deepseek_v3"]
    folder = write_folder(case, tmp_path / "hf", **case.variants["kimi_k2"])
    expected = load_reference(case, folder)
    config = renamed(json.loads((folder / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(config))
    model, source = load_hf_model(folder)
    assert source.family.model_type == "kimi_k2"
    save_hf_model(model, tmp_path / "out", source=source)
    assert_equal_tensors(folder, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        found, logits = model(tokens), expected(input_ids=tokens).logits
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)


def test_a_refusal_names_the_type_of_the_file():
    case = all_cases()["deepseek_v3"]
    config = renamed(case.written_config(case.first), scoring_func="softmax")
    with pytest.raises(InputError, match=r"of a kimi_k2 .*scoring_func='softmax'"):
        BY_MODEL_TYPE["kimi_k2"].builder_arguments(config)
