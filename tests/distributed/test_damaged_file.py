"""A damaged file stops every process with the same sentence, also those that do not read it."""

from helpers_train import HF_CONFIG, config, on_ranks
from hf_helpers import read_tensors, rewrite

from moe_builders.hub import create_hf_model


def test_nan_in_one_ranks_slice(tmp_path):
    base = tmp_path / "base"
    create_hf_model(base, HF_CONFIG, seed=0)
    name = "model.layers.0.mlp.experts.7.down_proj.weight"  # the second rank's
    _, tensor = read_tensors([base / "model.safetensors"])[name]
    tensor[3, 4] = float("nan")
    rewrite(base, {name: tensor})
    cfg = config(tmp_path / "out", model=None, base_model=str(base), batch_size=2, max_steps=1)
    answers = on_ranks(2, {"load": ("sentence_of", cfg)}, tmp_path)
    first, second = answers["load"]
    assert first == second
    assert "left NaN in 1 parameters: layers.0.mlp.experts.down_proj" in first


def test_an_export_that_one_process_cannot_write(tmp_path):
    """The first process makes the folder; the other must not wait for it for half an hour."""
    out = tmp_path / "out"
    out.mkdir()
    (out / ".model.partial").write_text("in the way")
    cfg = config(out, batch_size=2, max_steps=1)
    answers = on_ranks(2, {"save": ("sentence_of", cfg)}, tmp_path)
    first, second = answers["save"]
    assert first == second
    assert "model cannot be written: [Errno 17] File exists" in first
