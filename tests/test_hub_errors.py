"""What is wrong with a folder or a path is said in one sentence, before any work is lost."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hf_helpers import load_hf, rewrite, write_hf_folder

from moe_builders import hub
from moe_builders.checkpoint.folder import INDEX_NAME, SINGLE_NAME
from moe_builders.errors import InputError
from moe_builders.hub import load_hf_model, save_hf_model

LAYER = "model.layers.1."


@pytest.fixture
def folder(tmp_path):
    return write_hf_folder(tmp_path / "source")


@pytest.fixture
def sharded(tmp_path):
    return write_hf_folder(tmp_path / "source", shard_size="100KB")


def refusal(call, *args, **kwargs) -> str:
    """The message; one sentence without line breaks."""
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1050
    return message


def edit_config(folder: Path, **changes) -> None:
    """Set fields of config.json; None removes."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def test_all_wrong_tensors_are_listed_at_once(folder):
    changes = {
        f"{LAYER}self_attn.q_norm.weight": None,
        f"{LAYER}mlp.experts.6.up_proj.weight": None,
        f"{LAYER}mlp.experts.2.down_proj.weight": torch.zeros(32, 64),
        f"{LAYER}mlp.experts.8.up_proj.weight": torch.zeros(32, 64),
        "model.layers.3.input_layernorm.weight": torch.zeros(64),
    }
    rewrite(folder, changes)
    message = refusal(load_hf_model, folder)
    assert str(folder) in message
    assert f"2 missing: {LAYER}self_attn.q_norm.weight, {LAYER}mlp.experts.6.up_proj" in message
    assert "2 surplus: " in message
    assert all(name in message for name in changes)
    mis_shaped = f"1 mis-shaped: {LAYER}mlp.experts.2.down_proj.weight [32, 64] instead of [64, 32]"
    assert mis_shaped in message


def test_a_long_list_is_cut(folder):
    edit_config(folder, num_hidden_layers=20)
    message = refusal(load_hf_model, folder)
    assert f"{17 * 33} missing: " in message
    assert f"and {17 * 33 - 20} more" in message


CUTS = {
    "empty": lambda header: 0,
    "in the length": lambda header: 5,
    "after the length": lambda header: 8,
    "in the header": lambda header: 8 + header // 2,
    "after the header": lambda header: 8 + header,
    "in the data": lambda header: 8 + header + 1001,
    "last byte": lambda header: -1,
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
def test_truncated_file(tmp_path, cut, shard_size):
    write_hf_folder(tmp_path, shard_size=shard_size)
    path = sorted(tmp_path.glob("*.safetensors"))[-1]
    content = path.read_bytes()
    path.write_bytes(content[: CUTS[cut](struct.unpack("<Q", content[:8])[0])])
    message = refusal(load_hf_model, tmp_path)
    assert f"{path} is truncated" in message


CORRUPTIONS = {
    "length": (b"", b"\xff\xff\xff\xff\xff\xff\xff\x7f"),
    "not JSON": (b'"dtype"', b"'dtype'"),
    "another key": (b'"dtype"', b'"dtyqe"'),
    "no shape": (b'"shape"', b'"shaqe"'),
    "unknown type": (b'"F32"', b'"F31"'),
    "a type of another size": (b'"F32"', b'"F16"'),
    "shape": (b"[128,64]", b"[128,65]"),
    "no offsets": (b"[0,32768]", b"[       ]"),
    "offsets are text": (b"[0,32768]", b'"0,32768"'),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_corrupted_header(folder, corruption):
    path = folder / SINGLE_NAME
    content = path.read_bytes()
    old, new = CORRUPTIONS[corruption]
    damaged = content.replace(old, new, 1) if old else new + content[8:]
    assert damaged != content
    path.write_bytes(damaged)
    message = refusal(load_hf_model, folder)
    assert str(folder) in message
    assert any(word in message for word in ("truncated", "cannot be read", "mis-shaped", "F31"))


def test_another_architecture(folder):
    edit_config(folder, model_type="llama")
    message = refusal(load_hf_model, folder)
    assert "type 'llama'" in message
    assert "supported are: " in message
    assert "qwen3_moe" in message


@pytest.mark.parametrize("model_type", [None, ["qwen3_moe"], {}])
def test_no_model_type(folder, model_type):
    edit_config(folder, model_type=model_type)
    assert f"type {model_type!r}" in refusal(load_hf_model, folder)


@pytest.mark.parametrize("content", ["{", "[1]", "null"])
def test_config_is_not_an_object(folder, content):
    (folder / "config.json").write_text(content)
    assert "config.json is not" in refusal(load_hf_model, folder)


def test_no_config(folder):
    (folder / "config.json").unlink()
    assert f"{folder} is not a Hugging Face model folder" in refusal(load_hf_model, folder)


def test_no_folder(tmp_path):
    assert "no config.json" in refusal(load_hf_model, tmp_path / "nowhere")


def test_only_pickled_weights(folder):
    (folder / SINGLE_NAME).rename(folder / "pytorch_model.bin")
    message = refusal(load_hf_model, folder)
    assert "convert them to safetensors" in message


def test_no_weights(folder):
    (folder / SINGLE_NAME).unlink()
    assert f"holds neither {SINGLE_NAME} nor {INDEX_NAME}" in refusal(load_hf_model, folder)


def test_index_names_a_missing_file(sharded):
    file = sorted(sharded.glob("*.safetensors"))[3]
    file.unlink()
    message = refusal(load_hf_model, sharded)
    assert f"names files that are not there: {file.name};" in message


@pytest.mark.parametrize(
    "content", ["[]", "{}", "{", '{"weight_map": []}', '{"weight_map": {"a": 1}}']
)
def test_not_an_index(sharded, content):
    (sharded / INDEX_NAME).write_text(content)
    message = refusal(load_hf_model, sharded)
    assert f"{INDEX_NAME} is not an index" in message


def test_empty_index(sharded):
    (sharded / INDEX_NAME).write_text('{"weight_map": {}}')
    assert "none at all" in refusal(load_hf_model, sharded)


def test_index_names_a_file_elsewhere(sharded):
    """An export would be written to wherever the index points."""
    (sharded / INDEX_NAME).write_text('{"weight_map": {"a": "../b.safetensors"}}')
    assert "outside its folder: ../b.safetensors" in refusal(load_hf_model, sharded)


def test_two_models_in_a_folder(sharded, tmp_path):
    """transformers reads the single file, others the index: there is no telling which is meant."""
    (write_hf_folder(tmp_path / "b", seed=1) / SINGLE_NAME).rename(sharded / SINGLE_NAME)
    assert "two models: remove one" in refusal(load_hf_model, sharded)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("n_shared_experts", 1, "n_shared_experts=1"),
        (
            "rope_scaling",
            {"rope_type": "spiral", "factor": 4.0},
            "rope_type='spiral' (only default",
        ),
        ("rope_scaling", {"type": "linear", "rope_theta": 1e4}, "lacks rope_parameters.factor"),
        (
            "rope_parameters",
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "beta_fast": 1},
            "rope_parameters.beta_fast=1",
        ),
        (
            "rope_parameters",
            {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            "partial_rotary_factor=0.5 (only 1)",
        ),
        ("hidden_act", "gelu", "hidden_act='gelu' (only 'silu')"),
        ("use_sliding_window", True, "use_sliding_window=True (only False)"),
        ("attention_dropout", 0.1, "attention_dropout=0.1 (only 0)"),
        ("num_hidden_layers", None, "lacks num_hidden_layers"),
        ("num_experts", "four", "must be a number above 0: num_experts='four'"),
        ("head_dim", 0, "must be a number above 0: head_dim=0"),
        ("hidden_size", 64.0, "must be a number above 0: hidden_size=64.0"),
        ("rms_norm_eps", -1e-6, "must be a number above 0: rms_norm_eps=-1e-06"),
        ("num_attention_heads", True, "must be a number above 0: num_attention_heads=True"),
        ("decoder_sparse_step", 0, "must be a number above 0: decoder_sparse_step=0"),
        ("num_experts_per_tok", None, "lacks num_experts_per_tok"),
        ("rope_parameters", None, "lacks rope_theta"),
        ("num_local_experts", None, "lacks num_experts"),
    ],
)
def test_config_field(folder, field, value, words):
    edit_config(folder, **{field: value})
    message = refusal(load_hf_model, folder)
    assert words in message
    assert "config.json of a qwen3_moe" in message


def test_all_wrong_fields_are_listed_at_once(folder):
    edit_config(folder, a_field=1, hidden_act="relu", b_field=2)
    message = refusal(load_hf_model, folder)
    assert all(name in message for name in ("a_field=1", "b_field=2", "hidden_act='relu'"))


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (torch.float8_e4m3fn, "has no quantization_config that says how"),
        (torch.int8, "can be trained: get the unquantised release"),
    ],
)
def test_quantised_weights(folder, dtype, words):
    rewrite(folder, {"lm_head.weight": torch.zeros(128, 64, dtype=dtype)})
    message = refusal(load_hf_model, folder, dtype=torch.float32)
    assert words in message


def test_output_path_is_a_file_or_below_one(folder, tmp_path):
    model, source = load_hf_model(folder)
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        assert f"{tmp_path / 'file'} is a file" in refusal(
            save_hf_model, model, path, source=source
        )
    assert (tmp_path / "file").read_text() == "precious"


def test_exporting_onto_the_source(folder, tmp_path, monkeypatch):
    model, source = load_hf_model(folder)
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    for path in (folder, tmp_path / "x" / ".." / "source", tmp_path / "link", "source", tmp_path):
        assert "replace the model's own source" in refusal(
            save_hf_model, model, path, source=source
        )
    load_hf(folder)  # still there


def test_source_is_gone(folder, tmp_path):
    model, source = load_hf_model(folder)
    folder.rename(tmp_path / "moved")
    assert f"{folder}, which this model came from, is gone" in refusal(
        save_hf_model, model, tmp_path / "out", source=source
    )


def test_the_model_is_not_the_sources(folder, tmp_path):
    """A tensor that the source has no file for would be left out of the export."""
    other = write_hf_folder(tmp_path / "other", num_hidden_layers=4)
    message = refusal(
        save_hf_model,
        load_hf_model(other)[0],
        tmp_path / "out",
        source=load_hf_model(folder)[1],
    )
    assert "does not fit the model: 33 missing: model.layers.3" in message
    assert not (tmp_path / "out").exists()


def test_interrupted_export_leaves_the_older_one(folder, tmp_path, monkeypatch):
    model, source = load_hf_model(folder)
    out = tmp_path / "out"

    def break_down(*args) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hub, "copy_other_files", break_down)
        with pytest.raises(KeyboardInterrupt):
            save_hf_model(model, out, source=source)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    save_hf_model(model, out, source=source)
    (out / "mark").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(hub, "copy_other_files", break_down)
        with pytest.raises(KeyboardInterrupt):
            save_hf_model(model, out, source=source)
    assert (out / "mark").exists()
    load_hf(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
