"""What comes in as transformers writes it goes out again bit for bit, whatever its files."""

import pytest
import torch
from helpers_parity import load_reference
from hf_helpers import assert_equal_tensors, read_tensors, rewrite

from moe_builders.hub import load_hf_model, save_hf_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def source_of(case, variant, models, path, dtype="fp32", shards="5GB"):
    """As transformers saves a model that it has loaded, its config.json as nobody writes it."""
    model = models.hf(case, variant, dtype=DTYPES[dtype])
    model.save_pretrained(path, max_shard_size=shards)
    assert (len(list(path.glob("*.safetensors"))) > 2) == (shards != "5GB")
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config.replace('  "', '\t"') + "\n\n")
    return path


@pytest.mark.check("round_trip")
@pytest.mark.parametrize("shards", ["5GB", "100KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_is_exact(case, variant, dtype, shards, models, tmp_path):
    folder = source_of(case, variant, models, tmp_path / "source", dtype, shards)
    model, source = load_hf_model(folder)
    on_disk = {tensor.dtype for _, tensor in read_tensors(folder.glob("*.safetensors")).values()}
    assert DTYPES[dtype] in {p.dtype for p in model.parameters()} <= on_disk
    export = tmp_path / "export"
    save_hf_model(model, export, source=source)
    assert_equal_tensors(folder, export)
    assert {p.name for p in export.iterdir()} == {p.name for p in folder.iterdir()}
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            assert (export / path.name).read_bytes() == path.read_bytes(), path.name
    tokens = torch.arange(24).view(2, 12)
    expected = models.hf(case, variant, dtype=DTYPES[dtype])
    with torch.no_grad():
        found = load_reference(case, export, dtype=DTYPES[dtype])(input_ids=tokens).logits
        assert torch.equal(found, expected(input_ids=tokens).logits)
        assert model(tokens).dtype == torch.float32


@pytest.mark.needs("extra_tensors")
def test_tensors_without_a_place_are_carried_over(case, models, tmp_path):
    folder = source_of(case, case.first, models, tmp_path / "source")
    rewrite(folder, {name: torch.randn(shape) for name, shape in case.extra_tensors.items()})
    model, source = load_hf_model(folder)
    save_hf_model(model, tmp_path / "export", source=source)
    assert_equal_tensors(folder, tmp_path / "export")
