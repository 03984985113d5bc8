"""Folders with layers the model lacks, with a tied output, with several pieces in a tensor."""

import dataclasses
import math

import pytest
import torch
from hf_helpers import assert_equal_tensors, read_tensors, rewrite, write_hf_folder

from moe_builders.checkpoint import stream
from moe_builders.errors import InputError
from moe_builders.families import BY_MODEL_TYPE, qwen3_moe
from moe_builders.hf_rows import FURTHER_LAYERS
from moe_builders.hub import (
    build_hf_model,
    carried_over,
    create_hf_model,
    load_hf_model,
    read_hf_source,
    save_hf_model,
)
from moe_builders.weights import Interleave, make_plan


def use_rows(monkeypatch, *rows):
    family = dataclasses.replace(qwen3_moe.FAMILY, weight_map=(*qwen3_moe.WEIGHT_MAP, *rows))
    monkeypatch.setitem(BY_MODEL_TYPE, "qwen3_moe", family)


def test_further_layers_go_out_as_they_came(tmp_path, monkeypatch):
    folder = write_hf_folder(tmp_path / "source", dtype=torch.bfloat16)  # 3 layers
    further = {
        "model.layers.3.eh_proj.weight": torch.randn(3, 4),
        "model.layers.3.mlp.experts.0.up_proj.weight": torch.randn(2, 2).bfloat16(),
        "model.layers.3.input_layernorm.weight": torch.arange(3),
    }
    rewrite(folder, further)
    use_rows(monkeypatch, *FURTHER_LAYERS)
    model, source = load_hf_model(folder)
    assert sorted(carried_over(model, source)) == sorted(further)
    save_hf_model(model, tmp_path / "export", source=source)
    assert_equal_tensors(folder, tmp_path / "export")
    rewrite(folder, {"model.layers.2.eh_proj.weight": torch.randn(3, 4)})
    with pytest.raises(InputError, match=r"model: 1 surplus: model\.layers\.2\.eh_proj\.weight;"):
        load_hf_model(folder)


@pytest.fixture(params=[2**24, 700], ids=["at once", "in parts"])
def tied(tmp_path, request, monkeypatch):
    monkeypatch.setattr(stream, "_AT_ONCE", request.param)
    return write_hf_folder(tmp_path / "tied", dtype=torch.bfloat16, tie_word_embeddings=True)


def test_a_tied_output_goes_out_as_it_was_learned(tied, tmp_path):
    embedding = read_tensors(tied.glob("*.safetensors"))["model.embed_tokens.weight"][1]
    rewrite(tied, {"lm_head.weight": embedding.clone()})
    model, source = load_hf_model(tied)
    save_hf_model(model, tmp_path / "export", source=source)
    assert_equal_tensors(tied, tmp_path / "export")
    with torch.no_grad():
        model.tok_embeddings.weight[3] += 1
    save_hf_model(model, tmp_path / "export", source=source)
    learned = read_tensors((tmp_path / "export").glob("*.safetensors"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(learned[name][1], model.tok_embeddings.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tied_output_of_other_values_is_refused(tied, dtype):
    embedding = read_tensors(tied.glob("*.safetensors"))["model.embed_tokens.weight"][1]
    other = embedding.to(dtype, copy=True)
    other[5, 7] *= 1.25 if dtype == torch.bfloat16 else 1 + 1e-6  # the latter is lost in bf16
    rewrite(tied, {"lm_head.weight": other})
    with pytest.raises(InputError) as caught:
        load_hf_model(tied)
    assert str(caught.value) == (
        f"{tied} holds other values in lm_head.weight than in model.embed_tokens.weight, but the "
        "model has one parameter for both: untie them in config.json or remove the copy from the "
        "folder"
    )


def test_an_output_of_its_own_is_no_copy(tmp_path):
    folder = write_hf_folder(tmp_path / "source")
    plan = make_plan(qwen3_moe.WEIGHT_MAP, stream.model_shapes(load_hf_model(folder)[0]))
    assert [(p.ours, p.copy) for p in plan if p.disk == "lm_head.weight"] == [
        ("output.weight", False)
    ]


def test_a_new_tied_model_has_no_copy(tied, tmp_path):
    source = read_hf_source(tied)
    create_hf_model(tmp_path / "new", config=source.config, seed=0)
    assert read_hf_source(tmp_path / "new").tensors.keys() == source.tensors.keys()
    assert "lm_head.weight" not in source.tensors


def test_a_new_model_has_each_tensor_once(tmp_path, monkeypatch):
    """Also where several pieces share one: each counts once towards a file's size."""
    rows = tuple(
        Interleave("h.{l}.gate_up", row.ours, transposed=True)
        if row.ours.endswith("gate_up_proj") else row
        for row in qwen3_moe.WEIGHT_MAP
    )  # fmt: skip
    family = dataclasses.replace(qwen3_moe.FAMILY, weight_map=rows)
    monkeypatch.setitem(BY_MODEL_TYPE, "qwen3_moe", family)
    config = read_hf_source(write_hf_folder(tmp_path / "source")).config
    stacked = 4 * 8 * 64 * 64  # bytes of one layer's
    create_hf_model(tmp_path / "new", config=config, seed=0, max_shard_bytes=stacked)
    source = read_hf_source(tmp_path / "new")
    assert source.tensors["h.2.gate_up"].shape == (8, 64, 64)
    sizes = [sum(4 * math.prod(t.shape) for t in source.tensors.values() if t.file == file)
             for file in {t.file for t in source.tensors.values()}]  # fmt: skip
    assert max(sizes) == stacked
    model = build_hf_model(source)
    assert carried_over(model, source) == []
