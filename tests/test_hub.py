"""Hugging Face folders: what comes in goes out again, byte for byte but for what was learned."""

import dataclasses
import json

import pytest
import torch
from hf_helpers import assert_equal_tensors, load_hf, read_tensors, rewrite, write_hf_folder

from moe_builders.checkpoint import stream
from moe_builders.errors import InputError
from moe_builders.families import BY_MODEL_TYPE, qwen3_moe
from moe_builders.hub import (
    HFSource,
    build_hf_model,
    load_hf_model,
    load_hf_weights,
    read_hf_source,
    save_hf_model,
)
from moe_builders.weights import PassThrough, Row, Stack

SMALL_FILES = {
    "tokenizer.json": b'{"version": "1.0"}\r\n',
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": "{{ 'ä' }}".encode(),
    "merges.txt": b"a b\n",
    "tokenizer.model": bytes(range(256)),
}
LAYOUTS = {
    "single": {},
    "sharded": {"shard_size": "100KB"},
    "tied_bias_dense": {
        "tie_word_embeddings": True, "attention_bias": True, "mlp_only_layers": [1],
        "shard_size": "100KB",
    },
}  # fmt: skip


def use_rows(monkeypatch, rows: tuple[Row, ...]) -> None:
    family = dataclasses.replace(qwen3_moe.FAMILY, weight_map=rows)
    monkeypatch.setitem(BY_MODEL_TYPE, "qwen3_moe", family)


@pytest.fixture(params=LAYOUTS)
def source_folder(request, tmp_path):
    folder = write_hf_folder(tmp_path / "source", dtype=torch.bfloat16, **LAYOUTS[request.param])
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace('  "', '\t"') + "\n\n"
    )  # as nobody writes it
    for name, content in SMALL_FILES.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_hf_folder(tmp_path / "plain")


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_round_trip_is_exact(source_folder, tmp_path, dtype):
    model, source = load_hf_model(source_folder, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype or torch.bfloat16}
    out = tmp_path / "new" / "export"
    save_hf_model(model, out, source=source)
    assert_equal_tensors(source_folder, out)
    names = sorted(file.name for file in source_folder.iterdir())
    assert sorted(file.name for file in out.iterdir()) == names
    for name in names:
        if not name.endswith(".safetensors"):
            assert (out / name).read_bytes() == (source_folder / name).read_bytes(), name


def test_transformers_cannot_tell_the_export_from_its_source(source_folder, tmp_path):
    model, source = load_hf_model(source_folder)
    save_hf_model(model, tmp_path / "export", source=source)
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected = load_hf(source_folder, dtype=torch.bfloat16)(input_ids=tokens).logits
        found = load_hf(tmp_path / "export", dtype=torch.bfloat16)(input_ids=tokens).logits
    assert torch.equal(found, expected)


def test_only_what_was_learned_differs(source_folder, tmp_path):
    model, source = load_hf_model(source_folder)
    with torch.no_grad():
        model.layers[2].mlp.experts.gate_up_proj[5, 32:] += 1  # the up half of 32 + 32 rows
    save_hf_model(model, tmp_path / "export", source=source)
    before = read_tensors(source_folder.glob("*.safetensors"))
    after = read_tensors((tmp_path / "export").glob("*.safetensors"))
    changed = [name for name in before if not torch.equal(before[name][1], after[name][1])]
    assert changed == ["model.layers.2.mlp.experts.5.up_proj.weight"]


def test_each_tensor_keeps_its_own_dtype(folder, tmp_path):
    tensors = read_tensors([folder / "model.safetensors"])
    # one expert of a stack stays fp32: the stack must be kept in fp32 or its bits are lost
    wide = ("norm.weight", "mlp.gate.weight", "layers.1.mlp.experts.3.up_proj.weight")
    narrow = {name: t.bfloat16() for name, (_, t) in tensors.items() if not name.endswith(wide)}
    rewrite(folder, narrow)
    model, source = load_hf_model(folder)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes["layers.0.mlp.router.gate.weight"] == torch.float32
    assert dtypes["layers.0.mlp.experts.gate_up_proj"] == torch.bfloat16
    assert dtypes["layers.1.mlp.experts.gate_up_proj"] == torch.float32
    save_hf_model(model, tmp_path / "export", source=source)
    assert_equal_tensors(folder, tmp_path / "export")


def test_a_second_export_replaces_the_first(folder, tmp_path):
    model, source = load_hf_model(folder)
    save_hf_model(model, tmp_path / "export", source=source)
    (tmp_path / "export" / "stale.txt").write_text("old")
    save_hf_model(model, tmp_path / "export", source=source)
    assert not (tmp_path / "export" / "stale.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export", "plain"]


def test_weights_of_other_kinds_stay_behind(folder, tmp_path):
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf.h5", ".cache"):
        (folder / name).write_text("{}")
    (folder / "onnx").mkdir()
    model, source = load_hf_model(folder)
    save_hf_model(model, tmp_path / "export", source=source)
    names = sorted(p.name for p in (tmp_path / "export").iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors"]


def test_source_survives_json(source_folder):
    source = read_hf_source(source_folder)
    assert HFSource.from_json(source.to_json()) == source
    assert source.has_index == (source_folder / "model.safetensors.index.json").is_file()
    assert source.config == json.loads((source_folder / "config.json").read_text())


def test_tensors_without_a_place_are_carried_over(folder, tmp_path, monkeypatch):
    odd = {
        "model.mtp.0.w": torch.randn(3, 4),
        "model.mtp.12.w": torch.arange(5, dtype=torch.uint8),
        "model.mtp.2.w": torch.tensor(2.5, dtype=torch.float16),
    }
    rewrite(folder, odd)
    with pytest.raises(InputError, match=r"3 surplus: model\.mtp"):
        load_hf_model(folder)
    rows = (*qwen3_moe.WEIGHT_MAP, PassThrough("model.mtp.{l}.w"))
    use_rows(monkeypatch, rows)
    model, source = load_hf_model(folder)
    save_hf_model(model, tmp_path / "export", source=source)
    assert_equal_tensors(folder, tmp_path / "export")


def test_nothing_is_left_as_it_was_before_loading(folder, monkeypatch):
    source = read_hf_source(folder)
    model = build_hf_model(source)
    load_hf_weights(model, source)
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        assert tensor.device.type == "cpu", name
        assert tensor.isfinite().all(), name

    copy = stream._copy_overlap

    def skip_one(pieces, *args):
        if pieces[0].disk != "model.layers.1.mlp.experts.7.up_proj.weight":
            copy(pieces, *args)

    monkeypatch.setattr(stream, "_copy_overlap", skip_one)
    with pytest.raises(InputError, match=r"NaN in 1 .*layers\.1\.mlp\.experts\.gate_up_proj"):
        load_hf_weights(build_hf_model(source), source)


def test_wrong_rows_would_be_seen(folder, tmp_path, monkeypatch):
    """The comparison with transformers is what notices; the round trip alone cannot."""
    rows = tuple(
        Stack(row.disk.replace("{gate,up}", "{up,gate}"), row.ours) if type(row) is Stack else row
        for row in qwen3_moe.WEIGHT_MAP
    )
    tokens = torch.arange(12)[None]
    right = load_hf_model(folder)[0](tokens)
    use_rows(monkeypatch, rows)
    assert (load_hf_model(folder)[0](tokens) - right).abs().max() > 1e-2


def test_a_model_of_another_kind_is_not_exported(folder, tmp_path):
    _, source = load_hf_model(folder)
    other = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"not one of .* a qwen3_moe: no row fills 0\.weight"):
        save_hf_model(other, tmp_path / "export", source=source)
