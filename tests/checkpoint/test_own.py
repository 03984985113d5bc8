"""Models without a Hugging Face layout: saved and loaded under our own names."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchtune.modules import RotaryPositionalEmbeddings

from moe_builders.attention.gqa import GroupedQueryAttention
from moe_builders.attention.rope import RotaryEmbedding
from moe_builders.checkpoint import own
from moe_builders.checkpoint.own import MARKER_NAME, is_own_folder, load_model, save_model
from moe_builders.checkpoint.stream import materialize
from moe_builders.decoder import MoEDecoder, moe_decoder
from moe_builders.errors import InputError
from moe_builders.hub import is_hf_folder
from moe_builders.moe import moe_layer
from moe_builders.routers import ExpertChoiceTopKRouter

TOKENS = torch.arange(12).view(2, 6)


def composed() -> MoEDecoder:
    """Expert choice with shared experts below, sigmoid token choice with a bias buffer above."""

    def mlp(layer: int) -> nn.Module:
        numbers = partial(moe_layer, embed_dim=16, expert_hidden_dim=8, num_experts=4)
        if layer == 0:
            router = ExpertChoiceTopKRouter(dim=16, num_experts=4, capacity_factor=2.0)
            return numbers(router=router, shared_hidden_dim=24, shared_gate=True)
        return numbers(experts_per_token=2, score_function="sigmoid", expert_bias=True)

    return moe_decoder(
        vocab_size=32,
        embed_dim=16,
        num_layers=2,
        num_heads=4,
        head_dim=6,
        max_seq_len=16,
        attention=lambda layer: GroupedQueryAttention(
            embed_dim=16,
            num_heads=4,
            num_kv_heads=2,
            head_dim=6,
            rope=RotaryEmbedding(head_dim=6, base=100.0),
        ),
        mlp=mlp,
        tie_word_embeddings=True,
    )


@pytest.fixture
def model():
    model = composed()
    with torch.no_grad():
        for _, tensor in sorted(model.state_dict().items()):
            tensor.normal_(0, 0.3)
    return model


def on_meta() -> MoEDecoder:
    with torch.device("meta"):
        return composed()


def test_round_trip(model, tmp_path):
    save_model(model, tmp_path / "out")
    again = on_meta()
    load_model(again, tmp_path / "out")
    expected, found = model.state_dict(), again.state_dict()
    assert found.keys() == expected.keys()
    assert "layers.1.mlp.router.expert_bias" in found
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(again(TOKENS), model(TOKENS))
    assert not any(tensor.is_meta for tensor in [*again.parameters(), *again.buffers()])


def test_a_large_model_is_written_in_parts(model, tmp_path, monkeypatch):
    """All of a file is in memory at once."""
    monkeypatch.setattr(own, "MAX_FILE_BYTES", 10_000)
    save_model(model, tmp_path / "out")
    files = list((tmp_path / "out").glob("model-*-of-*.safetensors"))
    assert len(files) > 2
    again = on_meta()
    load_model(again, tmp_path / "out")
    expected, found = model.state_dict(), again.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_lies_on_disk(model, tmp_path):
    model.to(torch.bfloat16)
    bias = model.layers[1].mlp.router
    bias.expert_bias = bias.expert_bias.float()
    save_model(model, tmp_path / "out", component={"_component_": "a.b", "n": 3})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "model.safetensors",
        MARKER_NAME,
    ]
    on_disk, state = load_file(tmp_path / "out" / "model.safetensors"), model.state_dict()
    assert on_disk.keys() == state.keys()
    for name, tensor in state.items():
        assert on_disk[name].dtype == tensor.dtype, name
        assert torch.equal(on_disk[name], tensor), name
    assert json.loads((tmp_path / "out" / MARKER_NAME).read_text()) == {
        "format": 1,
        "component": {"_component_": "a.b", "n": 3},
    }
    assert is_own_folder(tmp_path / "out")
    assert not is_hf_folder(tmp_path / "out")
    assert not is_own_folder(tmp_path)


def test_a_model_keeps_its_dtype_when_loaded(model, tmp_path):
    save_model(model, tmp_path / "out")
    again = on_meta().to(torch.bfloat16)
    load_model(again, tmp_path / "out")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    name = "layers.0.mlp.shared_experts.w2.weight"
    assert torch.equal(again.state_dict()[name], model.state_dict()[name].bfloat16())


def test_differences_are_listed_in_one_error(model, tmp_path):
    save_model(model, tmp_path / "out")
    with torch.device("meta"):
        other = composed()
        other.layers[0].mlp.shared_gate = None
        other.layers[1].mlp.router.gate = nn.Linear(16, 4, bias=True)
        other.norm = nn.RMSNorm(8)
    with pytest.raises(InputError) as caught:
        load_model(other, tmp_path / "out")
    message = str(caught.value)
    assert f"{tmp_path / 'out'} does not fit the model" in message
    assert "1 missing: layers.1.mlp.router.gate.bias" in message
    assert "1 surplus: layers.0.mlp.shared_gate.weight" in message
    assert "1 mis-shaped: norm.weight [16] instead of [8]" in message
    assert all(parameter.is_meta for parameter in other.parameters())  # nothing was done yet


def test_integers_and_scalars(tmp_path):
    def build() -> nn.Module:
        module = nn.Module()
        module.register_buffer("steps", torch.tensor(7))
        module.register_buffer("flags", torch.tensor([True, False]))
        module.scale = nn.Parameter(torch.tensor(2.5))
        return module

    save_model(build(), tmp_path / "out")
    with torch.device("meta"):
        again = build()
    load_model(again, tmp_path / "out")
    assert (again.steps.item(), again.flags.tolist(), again.scale.item()) == (7, [True, False], 2.5)


def test_nan_on_disk_is_refused(model, tmp_path):
    model.layers[1].mlp.router.expert_bias[2] = float("nan")
    save_model(model, tmp_path / "out")
    with pytest.raises(InputError, match=r"NaN in 1 parameters: layers\.1\.mlp\.router\.expert_b"):
        load_model(on_meta(), tmp_path / "out")


class WithBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(3), persistent=False)


def test_a_buffer_that_nothing_would_fill_is_refused(model, tmp_path):
    save_model(model, tmp_path / "out")
    broken = on_meta()
    broken.layers[0].attn.q_norm = WithBuffer()
    with pytest.raises(InputError, match=r"buffer layers\.0\.attn\.q_norm\.table .* WithBuffer a"):
        load_model(broken, tmp_path / "out")
    with pytest.raises(InputError, match="buffer table is neither saved nor recomputed"):
        materialize(WithBuffer(), "cpu")


def test_rotary_tables_are_recomputed():
    with torch.device("meta"):
        ours = RotaryEmbedding(head_dim=8, base=50.0)
        torchtunes = RotaryPositionalEmbeddings(8, max_seq_len=5)
    materialize(ours, "cpu")
    materialize(torchtunes, "cpu")
    assert torch.equal(ours.inverse_frequency, 1 / 50.0 ** (torch.arange(0, 8, 2).float() / 8))
    assert torch.equal(torchtunes.cache, RotaryPositionalEmbeddings(8, max_seq_len=5).cache)


def test_memory_is_nan_until_it_is_filled():
    model = on_meta()
    materialize(model, "cpu")
    assert all(tensor.isnan().all() for tensor in model.state_dict().values())
