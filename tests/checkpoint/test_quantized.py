"""Quantised folders come in as bf16 and leave as bf16: dequantised as transformers does it."""

import json
import struct
from math import ceil

import pytest
import torch
from helpers_parity import all_cases, load_reference, write_folder
from hf_helpers import TINY, load_hf, read_tensors, rewrite, write_hf_folder
from safetensors.torch import save_file
from torch.nn.functional import pad
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moe_builders.base_model import BaseModel
from moe_builders.checkpoint.folder import INDEX_NAME, Entry
from moe_builders.checkpoint.quantized import open_tensors
from moe_builders.errors import InputError
from moe_builders.hf_source import HFSource, read_hf_source, unquantized_config
from moe_builders.hub import build_hf_model, create_hf_model, load_hf_model, save_hf_model
from moe_builders.ops import dequantize

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
W, SCALE = "a.weight", "a.weight_scale_inv"


def fp8_config(*block, **fields):
    return {"quantization_config": FP8 | {"weight_block_size": list(block)} | fields}


def padded(weight, block):
    """Up to whole blocks, with zeros."""
    rows, columns = weight.shape[-2:]
    return pad(weight.float(), (0, -columns % block[1], 0, -rows % block[0]))


def quantise(weight, block, scale_dtype=torch.float32):
    """Each block's largest value becomes 448, the largest of e4m3: (values, scales)."""
    whole = padded(weight, block)
    *lead, rows, columns = whole.shape
    grid = (*lead, rows // block[0], block[0], columns // block[1], block[1])
    scales = whole.reshape(grid).abs().amax((-3, -1)).clamp(min=1e-9) / 448
    if scale_dtype == torch.uint8:
        byte = scales.log2().ceil().add(127)
        scales, stored = (byte - 127).exp2(), byte.to(torch.uint8)
    else:
        scales = stored = scales.to(scale_dtype)
    values = whole.reshape(grid) / scales.float()[..., :, None, :, None]
    values = values.reshape(whole.shape)[..., : weight.shape[-2], : weight.shape[-1]]
    return values.to(torch.float8_e4m3fn).contiguous(), stored


def of_transformers(values, scales, block):
    """It takes whole blocks only."""
    whole = padded(values, block).to(torch.float8_e4m3fn)
    found = Fp8Dequantize(None)._dequantize_one(whole, scales, torch.bfloat16)
    return found[..., : values.shape[-2], : values.shape[-1]]


def write(folder, tensors, **files):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def whole_of(source, name):
    return source.read(name, (slice(None),) * len(source.entries[name].shape))


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_mxfp4(experts, out, groups, seed=0):
    stream = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, out, groups, 16), generator=stream)
    scales = torch.randint(100, 140, (experts, out, groups), generator=stream)
    return blocks.to(torch.uint8), scales.to(torch.uint8)


def test_fp8_by_hand(tmp_path):
    """3 × 5 in blocks of 2 × 2: the last row and the last column are partial blocks."""
    values = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 12, 13, 14, 15.0]])
    scales = torch.tensor([[1, 10, 100], [0.5, 0.25, 2]])
    tensors = {W: values.to(torch.float8_e4m3fn), SCALE: scales, "b": torch.arange(3.0)}
    source = open_tensors(write(tmp_path, tensors), fp8_config(2, 2))
    assert source.entries == {
        W: Entry("model.safetensors", "BF16", (3, 5)), "b": Entry("model.safetensors", "F32", (3,)),
    }  # fmt: skip
    found = whole_of(source, W)
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [[1, 2, 30, 40, 500], [6, 7, 80, 90, 1000], [5.5, 6, 3.25, 3.5, 30]]
    assert source.read(W, (slice(1, 3), slice(3, 5))).tolist() == [[90, 1000], [3.5, 30]]
    assert torch.equal(whole_of(source, "b"), torch.arange(3.0))


def test_mxfp4_by_hand(tmp_path):
    """Low four bits first; the disk's [e, out, in] is seen as [e, in, out]."""
    blocks = torch.zeros(1, 2, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0, :8] = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE])
    blocks[0, 1, 0, 0] = 0x27
    tensors = {"x_blocks": blocks, "x_scales": torch.tensor([[[128], [126]]], dtype=torch.uint8)}
    source = open_tensors(write(tmp_path, tensors), {"quantization_config": MXFP4})
    assert source.entries == {"x": Entry("model.safetensors", "BF16", (1, 32, 2))}
    found = whole_of(source, "x")
    upper = [0, 1, 2, 3, 4, 6, 8, 12]
    assert found[0, :, 0].tolist() == upper + [-value for value in upper] + [0] * 16
    assert found[0, :, 1].tolist() == [3, 0.5] + [0] * 30
    assert found.is_contiguous()


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize(
    ("shape", "block"),
    [((64, 96), (32, 32)), ((160, 200), (128, 128)), ((576, 72), (128, 128)), ((70, 90), (32, 64)),
     ((3, 40, 50), (32, 32))],
)  # fmt: skip
def test_fp8_equals_transformers(tmp_path, shape, block, scale_dtype):
    values, scales = quantise(random(*shape), block, scale_dtype)
    assert scales.shape[-2:] == (ceil(shape[-2] / block[0]), ceil(shape[-1] / block[1]))
    source = open_tensors(write(tmp_path, {W: values, SCALE: scales}), fp8_config(*block))
    found = whole_of(source, W)
    assert torch.equal(found, of_transformers(values, scales, block))
    error = (found.float() - random(*shape)).abs().max()
    assert error < 0.2, "and it is the weight that was quantised"


def test_e8m0_scales_as_their_own_type(tmp_path):
    values, scales = quantise(random(40, 40), (32, 32), torch.uint8)
    named = scales.view(torch.float8_e8m0fnu)
    sources = [
        open_tensors(write(tmp_path / name, {W: values, SCALE: stored}), fp8_config(32, 32))
        for name, stored in (("byte", scales), ("named", named))
    ]
    first, second = (whole_of(source, W) for source in sources)
    assert torch.equal(first, second)


def test_every_byte_is_a_power_of_two():
    found = dequantize.scale_values(torch.arange(255, dtype=torch.uint8))
    assert found.double().tolist() == [2.0 ** (byte - 127) for byte in range(255)]


@pytest.mark.parametrize(("experts", "out", "groups"), [(1, 32, 1), (3, 10, 5), (2, 64, 3)])
def test_mxfp4_equals_transformers(tmp_path, experts, out, groups):
    blocks, scales = random_mxfp4(experts, out, groups)
    tensors = {"m.x_blocks": blocks, "m.x_scales": scales}
    source = open_tensors(write(tmp_path, tensors), {"quantization_config": MXFP4})
    assert torch.equal(whole_of(source, "m.x"), convert_moe_packed_tensors(blocks, scales))


def test_mxfp4_in_many_rounds(tmp_path, monkeypatch):
    monkeypatch.setattr("moe_builders.checkpoint.quantized._CHUNK", 7 * 160)
    test_mxfp4_equals_transformers(tmp_path, 3, 10, 5)


REGIONS = [
    [(0, 1), (0, 1)], [(31, 33), (0, 90)], [(32, 64), (64, 90)], [(1, 70), (63, 65)],
    [(69, 70), (89, 90)], [(5, 6), (0, 90)], [(33, 33), (0, 90)], [(0, 70), (7, 7)],
]  # fmt: skip


@pytest.mark.parametrize("ends", REGIONS, ids=str)
def test_a_region_is_cut_out_of_the_whole(tmp_path, ends):
    values, scales = quantise(random(70, 90), (32, 64))
    blocks, mx_scales = random_mxfp4(3, 90, 3)
    region = tuple(slice(*end) for end in ends)
    fp8 = open_tensors(write(tmp_path / "a", {W: values, SCALE: scales}), fp8_config(32, 64))
    assert torch.equal(fp8.read(W, region), whole_of(fp8, W)[region])
    tensors = {"x_blocks": blocks, "x_scales": mx_scales}
    mxfp4 = open_tensors(write(tmp_path / "b", tensors), {"quantization_config": MXFP4})
    for expert in (slice(0, 3), slice(1, 2), slice(2, 2)):
        found = mxfp4.read("x", (expert, *region))
        assert torch.equal(found, whole_of(mxfp4, "x")[(expert, *region)])


def test_only_the_blocks_of_a_region_are_read(tmp_path, monkeypatch):
    values, scales = quantise(random(160, 96), (32, 32))
    source = open_tensors(write(tmp_path, {W: values, SCALE: scales}), fp8_config(32, 32))
    seen = []
    inner = source._folder.read
    monkeypatch.setattr(source._folder, "read", lambda *a: seen.append(inner(*a)) or seen[-1])
    source.read(W, (slice(33, 65), slice(0, 96)))
    assert [tuple(part.shape) for part in seen] == [(32, 96), (2, 3)]


def quantise_folder(folder, block, dtype=torch.float32):
    """Matrices but for routers and embeddings as FP8; gives them as bf16, by transformers."""
    files = {path: {} for path in folder.glob("*.safetensors")}
    expected = {}
    for name, (file, tensor) in read_tensors(files).items():
        stored = {name: tensor.to(torch.bfloat16)}
        expected[name] = stored[name]
        if name.endswith(("proj.weight", "_with_mqa.weight")):
            values, scales = quantise(tensor, block, dtype)
            stored = {name: values, f"{name}_scale_inv": scales}
            expected[name] = of_transformers(values, scales, block)
        files[folder / file] |= stored
    for path, tensors in files.items():
        save_file(tensors, path, {"format": "pt"})
    weight_map = {name: path.name for path, tensors in files.items() for name in tensors}
    if (folder / INDEX_NAME).is_file():
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text()) | fp8_config(*block)
    (folder / "config.json").write_text(json.dumps(config, indent="\t") + "\n\n")
    return expected


@pytest.mark.parametrize("block", [(32, 32), (128, 128)], ids=str)
@pytest.mark.parametrize("shard_size", ["5GB", "300KB"])
def test_a_family_from_end_to_end(tmp_path, block, shard_size):
    """Widths of 160 and 72: partial blocks of both sizes, on both sides."""
    folder = write_hf_folder(
        tmp_path / "fp8", shard_size=shard_size, hidden_size=160, moe_intermediate_size=72
    )
    expected = quantise_folder(folder, block)
    model, source = load_hf_model(folder, dtype=torch.float32)
    assert source.is_quantized
    assert HFSource.from_json(source.to_json()) == source
    out = tmp_path / "out"
    save_hf_model(model, out, source=source)
    exported = read_tensors(out.glob("*.safetensors"))
    assert exported.keys() == expected.keys()
    for name, tensor in expected.items():
        assert exported[name][1].dtype == torch.bfloat16
        assert torch.equal(exported[name][1], tensor), name
    assert {p.name for p in out.iterdir()} == {p.name for p in folder.iterdir()}
    assert (out / INDEX_NAME).is_file() is (shard_size != "5GB") is source.has_index
    if source.has_index:
        index = json.loads((out / INDEX_NAME).read_text())
        assert index["weight_map"] == {name: file for name, (file, _) in exported.items()}
        size = sum(t.numel() * 2 for t in expected.values())
        assert index["metadata"] == {"total_size": size}
    config = (folder / "config.json").read_text()
    assert json.loads((out / "config.json").read_text()) == {
        name: "bfloat16" if name == "dtype" else value
        for name, value in json.loads(config).items() if name != "quantization_config"
    }  # fmt: skip
    tokens = torch.arange(24).reshape(2, 12) * 5 % TINY["vocab_size"]
    with torch.no_grad():
        reference = load_hf(out)(tokens).logits
        assert (model(tokens) - reference).abs().max() <= 1e-5
    again, plain = load_hf_model(out)
    assert not plain.is_quantized
    stored = build_hf_model(read_hf_source(folder)).state_dict()
    assert {n: t.dtype for n, t in again.state_dict().items()} == {
        n: t.dtype for n, t in stored.items()
    }


def test_tensors_without_a_place_are_dequantised_too(tmp_path, monkeypatch):
    """config.json of the export speaks of no quantisation: nothing may be left quantised."""
    import dataclasses

    from moe_builders.families import BY_MODEL_TYPE, qwen3_moe
    from moe_builders.weights import PassThrough

    rows = (*qwen3_moe.FAMILY.weight_map, PassThrough("mtp.{n}.proj.weight"))
    family = dataclasses.replace(qwen3_moe.FAMILY, weight_map=rows)
    monkeypatch.setitem(BY_MODEL_TYPE, "qwen3_moe", family)
    folder = write_hf_folder(tmp_path / "fp8", dtype=torch.bfloat16)
    quantise_folder(folder, (32, 32))
    values, scales = quantise(random(50, 70), (32, 32))
    extra = {"mtp.0.proj.weight": values, "mtp.0.proj.weight_scale_inv": scales}
    rewrite(folder, extra)
    model, source = load_hf_model(folder)
    save_hf_model(model, tmp_path / "out", source=source)
    widened, note = BaseModel(model, str(folder), source, None).notes
    assert widened == f"{folder} is quantised: it is trained, and exported, as if it were in bf16"
    assert note.endswith("exported as found, or in bf16 if quantised: mtp.0.proj.weight")
    exported = read_tensors((tmp_path / "out").glob("*.safetensors"))
    assert torch.equal(exported["mtp.0.proj.weight"][1], of_transformers(values, scales, (32, 32)))
    assert not any(name.endswith("_scale_inv") for name in exported)


def test_deepseek_v3_from_end_to_end(tmp_path):
    """As the release: partial blocks in 28 rows of latent and rotary key, a further layer."""
    case, block = all_cases()["deepseek_v3"], (16, 16)
    folder = write_folder(case, tmp_path / "fp8", **case.variants["yarn"])
    exact = {
        name: tensor
        for name, (_, tensor) in read_tensors(folder.glob("*.safetensors")).items()
        if name.endswith("e_score_correction_bias")
    }
    expected = quantise_folder(folder, block) | exact
    latent = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    stored = read_tensors(folder.glob("*.safetensors"))
    assert stored[latent][1].shape == (28, 64)
    assert stored[f"{latent}_scale_inv"][1].shape == (2, 4)
    further, scales = quantise(random(64, 100), block)
    name = "model.layers.3.eh_proj.weight"
    rewrite(folder, {**exact, name: further, f"{name}_scale_inv": scales})
    model, source = load_hf_model(folder, dtype=torch.float32)
    save_hf_model(model, tmp_path / "out", source=source)
    exported = read_tensors((tmp_path / "out").glob("*.safetensors"))
    passed = exported.pop(name)[1]
    assert torch.equal(passed, of_transformers(further, scales, block))
    assert exported.keys() == expected.keys()
    for name, tensor in expected.items():
        assert exported[name][1].dtype == tensor.dtype
        assert torch.equal(exported[name][1], tensor), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    dequantised = write(
        tmp_path / "dequantised", {name: tensor.contiguous() for name, tensor in expected.items()}
    )
    (dequantised / "config.json").write_text(json.dumps(config))
    tokens = torch.arange(24).reshape(2, 12) * 5 % 128
    with torch.no_grad():
        reference = load_reference(case, dequantised)(tokens).logits
        assert (model(tokens) - reference).abs().max() <= 1e-5


def test_gpt_oss_from_end_to_end(tmp_path):
    """Blocks and scales in files of their own; what was learned is what transformers reads."""
    case = all_cases()["gpt_oss"]
    folder = write_folder(case, tmp_path / "mxfp4")
    files, expected = {"a": {}, "b": {}, "c": {}}, {}
    for name, (file, tensor) in read_tensors(folder.glob("*.safetensors")).items():
        (folder / file).unlink(missing_ok=True)
        expected[name] = files["b"][name] = tensor.to(torch.bfloat16)
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inner, out = tensor.shape
            blocks, scales = random_mxfp4(experts, out, inner // 32)
            scales -= 10
            files["a"][f"{name}_blocks"], files["c"][f"{name}_scales"] = blocks, scales
            expected[name] = convert_moe_packed_tensors(blocks, scales)
            del files["b"][name]
    for file, tensors in files.items():
        save_file(tensors, folder / f"{file}.safetensors", {"format": "pt"})
    weight_map = {name: f"{file}.safetensors" for file in files for name in files[file]}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": MXFP4}
    (folder / "config.json").write_text(json.dumps(config))
    model, source = load_hf_model(folder, dtype=torch.float32)
    out = tmp_path / "out"
    save_hf_model(model, out, source=source)
    exported = read_tensors(out.glob("*.safetensors"))
    assert exported.keys() == expected.keys()
    for name, tensor in expected.items():
        assert exported[name][1].dtype == torch.bfloat16
        assert torch.equal(exported[name][1], tensor), name
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((1.02 * parameter).bfloat16())  # as a run may leave it, and exact
    save_hf_model(model, out, source=source)
    tokens = torch.arange(24).reshape(2, 12) * 5 % 128
    with torch.no_grad():
        reference = load_reference(case, out)(tokens).logits
        assert (model(tokens) - reference).abs().max() <= 1e-5 * reference.abs().max()


CONFIGS = {
    '{"a": 1e-6,\r\n "quantization_config": {"x": [1, {"}": "\\"]"}]}, "b": "ä"}\n\n':
        '{"a": 1e-6, "b": "ä"}\n\n',
    '{\n\t"quantization_config" :\n{} ,\n\t"torch_dtype":"float8_e4m3fn"\n}':
        '{\n\t"torch_dtype":"bfloat16"\n}',
    '{"dtype": null, "torch_dtype": "float16", "quantization_config": {"dtype": "x"}}':
        '{"dtype": "bfloat16", "torch_dtype": "bfloat16"}',
    '{"quantization_config": {}}': "{}",
    ' { "a" : {"quantization_config": 1, "dtype": "x"} } ':
        ' { "a" : {"quantization_config": 1, "dtype": "x"} } ',
    "{}": "{}",
}  # fmt: skip


@pytest.mark.parametrize("text", CONFIGS)
def test_every_other_character_of_config_json_stays(text):
    found = unquantized_config(text)
    assert found == CONFIGS[text]
    json.loads(found)


def refusal(tensors, config, folder):
    with pytest.raises(InputError) as caught:
        open_tensors(write(folder, tensors), config)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message.replace(str(folder), "F")


F8 = torch.zeros(160, 64).to(torch.float8_e4m3fn)
ONES = torch.ones(5, 2)
BLOCKS, SCALES = random_mxfp4(2, 6, 3)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method is 'gptq', but only 'fp8' and 'mxfp4' "
         "can be dequantised: get the bf16 release, or convert the folder to bf16"),
        ({}, "quant_method is None, but only"),
        (FP8 | {"quant_method": ["fp8"]}, "quant_method is ['fp8'], but only"),
        (FP8 | {"weight_block_size": None}, "weight_block_size=None (only two whole numbers"),
        (FP8 | {"weight_block_size": [128]}, "weight_block_size=[128] (only two whole numbers"),
        (FP8 | {"weight_block_size": [0, 128]}, "weight_block_size=[0, 128] (only two"),
        (FP8 | {"weight_block_size": [1.5, 128]}, "weight_block_size=[1.5, 128] (only two"),
        (FP8 | {"fmt": "e5m2"}, "method 'fp8' holds what is not supported: fmt='e5m2' (only"),
        (FP8 | {"activation_scheme": "static"}, "activation_scheme='static' (only 'dynamic')"),
        (FP8 | {"expert_dtype": "fp4"}, "expert_dtype='fp4' (only 'fp8')"),
        (FP8 | {"new": 1, "fmt": 2}, "fmt=2 (only 'e4m3'), new=1; get the bf16 release"),
        (MXFP4 | {"weight_block_size": [32, 32]}, "weight_block_size=[32, 32]; get the bf16"),
    ],
)  # fmt: skip
def test_a_quantisation_that_is_not_honoured(tmp_path, fields, words):
    message = refusal({W: F8, SCALE: ONES}, {"quantization_config": fields}, tmp_path)
    assert message.startswith("F/config.json: quantization_config")
    assert words in message


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({W: F8}, "F: a.weight is F8_E4M3, but its scale a.weight_scale_inv is not there: "),
        ({W: F8, "c": F8.clone(), "d": F8.clone()}, "is not there, and 2 more: download"),
        ({SCALE: ONES}, "is the scale of an F8_E4M3 weight, but a.weight is not there"),
        ({SCALE: ONES, W: F8.bfloat16()}, "is the scale of an F8_E4M3 weight, but a.weight is BF"),
        ({SCALE: ONES, W: F8.to(torch.float8_e5m2)}, "a.weight is F8_E5M2"),
        ({"c": F8.to(torch.float8_e5m2)}, "c is F8_E5M2, but weights must be F8_E4M3"),
        ({W: F8, SCALE: torch.ones(5, 1)}, "a.weight_scale_inv is F32 [5, 1], but must be [5, 2]"),
        ({W: F8, SCALE: torch.ones(2)}, "F32 [2], but must be [5, 2] of F32, BF16, F16, U8, "),
        ({W: F8, SCALE: ONES.double()}, "is F64 [5, 2], but must be [5, 2] of F32"),
        ({W: F8[0], SCALE: ONES[0]}, "is F32 [2], but must be"),
        ({W: F8.bfloat16()}, "holds no quantised tensor, but config.json has a quantization_config "
         "(quant_method='fp8'): take it out"),
    ],
)  # fmt: skip
def test_fp8_weights_and_scales_that_do_not_go_together(tmp_path, tensors, words):
    assert words in refusal(tensors, fp8_config(32, 32), tmp_path)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"x_blocks": BLOCKS}, "F: x_blocks goes with x_scales, which is not there: download"),
        ({"x_scales": SCALES}, "x_scales goes with x_blocks, which is not there"),
        ({"x_blocks": BLOCKS, "x_scales": SCALES, "x": ONES}, "x is there twice, as itself and as"),
        ({"x_blocks": BLOCKS, "x_scales": SCALES[:, :5]},
         "x_scales is U8 [2, 5, 3], but must be U8 [2, 6, 3] for x_blocks [2, 6, 3, 16]"),
        ({"x_blocks": BLOCKS[..., :8].contiguous(), "x_scales": SCALES}, "is [2, 6, 3, 8], but"),
        ({"x_blocks": BLOCKS[0], "x_scales": SCALES[0]}, "x_blocks is [6, 3, 16], but must be [e,"),
        ({"x": ONES}, "holds no quantised tensor"),
    ],
)  # fmt: skip
def test_mxfp4_blocks_and_scales_that_do_not_go_together(tmp_path, tensors, words):
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert words in refusal(tensors, {"quantization_config": MXFP4}, tmp_path)


@pytest.mark.parametrize(
    ("tensors", "word"),
    [({W: F8}, "a.weight of type F8_E4M3"), ({SCALE: ONES, "b": F8}, ", and 1 more), but config."),
     ({"x_blocks": BLOCKS}, "x_blocks of type U8"), ({SCALE: ONES}, "a.weight_scale_inv of type")],
)  # fmt: skip
def test_quantised_tensors_that_nothing_explains(tmp_path, tensors, word):
    message = refusal(tensors, {"quantization_config": None}, tmp_path)
    assert word in message
    assert message.endswith("no quantization_config that says how: download config.json again")


def test_quantization_config_is_no_mapping(tmp_path):
    message = refusal({W: F8}, {"quantization_config": "fp8"}, tmp_path)
    assert "quantization_config is 'fp8', but must be a mapping" in message


def test_nan_in_a_scale_is_told(tmp_path):
    folder = write_hf_folder(tmp_path / "fp8", dtype=torch.bfloat16)
    quantise_folder(folder, (32, 32), torch.uint8)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    name = "model.layers.1.mlp.experts.2.down_proj.weight_scale_inv"
    (length,) = struct.unpack("<Q", content[:8])
    start = json.loads(content[8 : 8 + length])[name]["data_offsets"][0] + 8 + length
    path.write_bytes(content[:start] + b"\xff" + content[start + 1 :])
    with pytest.raises(InputError, match=r"left NaN in 1 parameters: layers.1.mlp.experts.down"):
        load_hf_model(folder)


def test_a_new_model_is_not_quantised(tmp_path):
    config = dict(TINY) | {"model_type": "qwen3_moe"} | fp8_config(128, 128)
    create_hf_model(tmp_path / "new", config, seed=0)
    assert not load_hf_model(tmp_path / "new")[1].is_quantized
