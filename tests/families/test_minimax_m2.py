"""What is MiniMax-M2's own: the bare sum, fields of its hub files, FP8 under Mixtral's names."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers_parity import all_cases, load_reference, write_folder
from hf_helpers import assert_equal_tensors, read_tensors
from safetensors.torch import save_file

from moe_builders.errors import InputError
from moe_builders.families.minimax_m2 import builder_arguments
from moe_builders.hub import load_hf_model, save_hf_model

ASSETS = Path(__file__).parents[1] / "assets" / "configs"


@pytest.fixture
def case():
    return all_cases()["minimax_m2"]


@pytest.fixture
def released():
    return json.loads((ASSETS / "MiniMax-M2.json").read_text())


def test_nothing_is_added_to_the_sum_of_the_weights(case, tmp_path):
    """Scores of e^-60: 10^-20 beside them would turn the layer off."""
    folder = write_folder(case, tmp_path)
    pair = SimpleNamespace(hf=load_reference(case, folder), ours=load_hf_model(folder)[0])
    x = torch.randn(2, 10, 64, generator=torch.Generator().manual_seed(0))
    x[..., 0] = 1
    ours, theirs = pair.ours.layers[0].mlp, pair.hf.model.layers[0].mlp
    with torch.no_grad():
        for gate in (ours.router.gate, theirs.gate):
            gate.weight[:, 0] = -60
        ours.router.expert_bias.zero_()
        theirs.e_score_correction_bias.zero_()
        expected = theirs(x)
        found = ours(x)
    assert expected.std() > 0.03
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "fraction"),
    [
        ({"rotary_dim": 32}, 0.25),
        ({"rotary_dim": None}, 1.0),
        ({"partial_rotary_factor": 0.75}, 0.75),  # goes before rotary_dim
        ({"rope_parameters": {"rope_theta": 5e6, "partial_rotary_factor": 0.125}}, 0.125),
        ({"partial_rotary_factor": None}, 1.0),
    ],
    ids=str,
)
def test_spellings_of_the_turned_part(case, released, fields, fraction):
    config = released | fields
    found = builder_arguments(config)["rope_fraction"]
    assert found == fraction
    rope = case.completed({k: v for k, v in config.items() if k != "quantization_config"})
    assert rope["rope_parameters"].get("partial_rotary_factor", 1.0) == fraction


@pytest.mark.parametrize(
    "field",
    [
        {"qk_norm_type": "per_head"},
        {"use_qk_norm": False},
        {"attention_bias": True},
        {"use_routing_bias": False},
        {"scoring_func": "softmax"},
        {"shared_intermediate_size": 64},
        {"sliding_window": 512},
        {"attn_type_list": [1] * 61 + [0]},
        {"layernorm_full_attention_beta": 2.0},
        {"layernorm_mlp_beta": 0.5},
        {"router_jitter_noise": 0.1},
        {"num_experts_per_tok": 1},
    ],
    ids=str,
)
def test_fields_of_a_hub_file_that_would_change_the_model(released, field):
    ((name, value),) = field.items()
    with pytest.raises(InputError) as raised:
        builder_arguments(released | field)
    assert f"{name}={value!r}" in str(raised.value)


def test_fields_of_a_hub_file_that_change_nothing(released):
    fields = {
        "attention_bias": False,
        "attn_type_list": [1] * 62,
        "layernorm_full_attention_beta": 1.0,
        "layernorm_linear_attention_beta": 1.0,
        "layernorm_mlp_beta": 1.0,
        "mlp_intermediate_size": 8192,
        "mtp_transformer_layers": 1,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "shared_moe_mode": "sigmoid",
        "sliding_window": None,
        "use_mtp": True,
    }
    assert builder_arguments(released | fields) == builder_arguments(released)


def in_blocks(shape, stream):
    """A random matrix as FP8 and scales of 128 x 128 blocks, and the bf16 that they stand for."""
    rows, columns = shape
    values = torch.randn(shape, generator=stream).to(torch.float8_e4m3fn)
    scales = 0.05 + 0.1 * torch.rand(-(-rows // 128), -(-columns // 128), generator=stream)
    wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    return values, scales, (values.float() * wide).to(torch.bfloat16)


def test_a_folder_in_fp8_blocks(case, released, tmp_path):
    """Experts, attention and a layer beyond the last as FP8; gates, biases, embeddings not."""
    folder = write_folder(
        case, tmp_path / "fp8", hidden_size=160, intermediate_size=144, dtype=torch.bfloat16
    )
    plain = write_folder(
        case, tmp_path / "plain", hidden_size=160, intermediate_size=144, dtype=torch.bfloat16
    )
    tensors = {n: t for n, (_, t) in read_tensors(folder.glob("*.safetensors")).items()}
    stream = torch.Generator().manual_seed(1)
    expected = dict(tensors)
    shapes = {
        name: tensor.shape
        for name, tensor in tensors.items()
        if name.endswith("proj.weight") or ".experts." in name
    }
    beyond = "model.layers.3.block_sparse_moe.experts.0.w1.weight"
    assert {shape[0] % 128 for shape in shapes.values()} >= {16, 32}  # partial blocks
    for name, shape in {**shapes, beyond: (144, 160)}.items():
        values, scales, expected[name] = in_blocks(shape, stream)
        tensors |= {name: values, f"{name}_scale_inv": scales}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    save_file(expected, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = released["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))

    model, source = load_hf_model(folder)
    wanted, _ = load_hf_model(plain)
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    save_hf_model(model, tmp_path / "out", source=source)
    assert_equal_tensors(plain, tmp_path / "out")
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
