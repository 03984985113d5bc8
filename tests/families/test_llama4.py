"""What Llama 4 has of its own: folders with a vision model, positions, older config.json."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from helpers_parity import Models, all_cases, randomise
from hf_helpers import assert_equal_tensors, read_tensors

from moe_builders.attention.temperature import PositionTemperature
from moe_builders.errors import InputError
from moe_builders.families.llama4 import FAMILY, MULTIMODAL, llama4_scout_17b_16e
from moe_builders.hub import carried_over, load_hf_model, save_hf_model
from moe_builders.ops.masks import block_causal_mask

CASE = all_cases()["llama4_text"]
CONFIGS = Path(__file__).parents[1] / "assets" / "configs"
VISION = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
    "vision_output_dim": 32, "image_size": 28, "patch_size": 14, "projector_input_dim": 32,
    "projector_output_dim": 32,
}  # fmt: skip
B, S = 3, 20


def written(**changes):
    return CASE.written_config("scout") | changes


def without(config, *names):
    return {name: value for name, value in config.items() if name not in names}


def multimodal_folder(path, *, tie=False, shards="5GB"):
    """A model that sees, with the text model of a variant."""
    fields = CASE.variants["maverick"] | {"tie_word_embeddings": tie}
    text = CASE.reference(**fields).to_dict()
    config = transformers.Llama4Config(text_config=text, vision_config=VISION)
    model = transformers.Llama4ForConditionalGeneration(config)
    randomise(model.language_model, seed=0)
    model.save_pretrained(path, max_shard_size=shards)
    return path


def load_multimodal(path):
    model, info = transformers.Llama4ForConditionalGeneration.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_a_multimodal_folder(tie, tmp_path):
    """Text is transformers' text; the rest passes through bit for bit."""
    folder = multimodal_folder(tmp_path / "source", tie=tie, shards="100KB")
    hf = load_multimodal(folder)
    ours, source = load_hf_model(folder)
    assert source.family is MULTIMODAL
    seen = {name for path in folder.glob("*.safetensors") for name in read_tensors([path])}
    carried = set(carried_over(ours, source))
    assert carried == {name for name in seen if not name.startswith("language_model.")}
    assert any(name.startswith("vision_model.") for name in carried)
    assert any(name.startswith("multi_modal_projector.") for name in carried)
    assert ("language_model.lm_head.weight" in seen) is not tie
    tokens = torch.randint(0, 128, (B, S), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = hf(input_ids=tokens).logits
        torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-5)
    save_hf_model(ours, tmp_path / "export", source=source)
    assert_equal_tensors(folder, tmp_path / "export")
    for path in folder.glob("*.json"):
        assert (tmp_path / "export" / path.name).read_bytes() == path.read_bytes()
    with torch.no_grad():
        assert torch.equal(load_multimodal(tmp_path / "export")(input_ids=tokens).logits, expected)


def test_what_was_trained_is_exported_beside_what_was_not(tmp_path):
    folder = multimodal_folder(tmp_path / "source")
    ours, source = load_hf_model(folder)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.01)
    save_hf_model(ours, tmp_path / "export", source=source)
    before, after = (read_tensors([f / "model.safetensors"]) for f in (folder, tmp_path / "export"))
    for name, (_, tensor) in before.items():
        same = not name.startswith("language_model.")
        assert torch.equal(after[name][1], tensor) is same, name
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        found = load_multimodal(tmp_path / "export")(input_ids=tokens).logits
        torch.testing.assert_close(ours(tokens), found, rtol=0, atol=1e-5)


def test_multimodal_config_is_its_text_config():
    text = written()
    whole = json.loads(transformers.Llama4Config(text_config=CASE.tiny).to_json_string())
    arguments = FAMILY.builder_arguments(text)
    assert MULTIMODAL.builder_arguments(whole | {"text_config": text}) == arguments
    assert MULTIMODAL.builder_arguments({"model_type": "llama4", "text_config": text}) == arguments
    for changes, message in (
        ({"text_config": None}, "a llama4 lacks text_config"),
        ({"text_config": 3}, r"a llama4 holds .*text_config=3 \(a mapping\)"),
        ({"tie_word_embeddings": True}, "a llama4 holds .*tie_word_embeddings=True"),
        ({"audio_config": {}}, "a llama4 holds .*audio_config"),
        ({"text_config": text | {"hidden_act": "gelu"}}, "a llama4_text holds .*hidden_act"),
    ):
        with pytest.raises(InputError, match=message):
            MULTIMODAL.builder_arguments(whole | {"text_config": text} | changes)


def test_layers_by_rule_where_no_list_is_given():
    listed = without(written(num_hidden_layers=6), "moe_layers", "no_rope_layers", "layer_types")
    for rules, moe, rope in (
        ({}, range(6), (0, 1, 2, 4, 5)),
        ({"interleave_moe_layer_step": 4}, (3,), (0, 1, 2, 4, 5)),
        ({"interleave_moe_layer_step": 2, "no_rope_layer_interval": 3}, (1, 3, 5), (0, 1, 3, 4)),
        ({"no_rope_layer_interval": 1}, range(6), ()),
    ):
        found = FAMILY.builder_arguments(listed | rules)
        reference = transformers.Llama4TextConfig(**without(listed | rules, "model_type"))
        assert list(found["moe_layers"]) == list(moe) == reference.moe_layers
        assert found["rope_layers"] == rope == found["chunk_layers"]
        assert [n for n, mark in enumerate(reference.no_rope_layers) if mark] == list(rope)


def test_older_spellings():
    config = written()
    assert FAMILY.builder_arguments(
        config | {"attn_temperature_tuning": 4, "no_rope_layers": [], "for_llm_compressor": False}
    ) == FAMILY.builder_arguments(config)
    off = FAMILY.builder_arguments(config | {"attn_temperature_tuning": 0})
    assert off == FAMILY.builder_arguments(config | {"attn_temperature_tuning": False})
    assert not off["temperature"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"no_rope_layers": [1, 1, 1]}, r"no_rope_layers=\[1, 1, 1\] \(4 of 0, 1\)"),
        ({"no_rope_layers": [1, 1, 2, 0]}, "no_rope_layers="),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types="),
        ({"attention_chunk_size": None}, "attention_chunk_size=None"),
        ({"attn_temperature_tuning": "yes"}, "attn_temperature_tuning='yes'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
    ],
)
def test_what_is_not_honoured_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        FAMILY.builder_arguments(written(**changes))


def test_frequencies_of_scout():
    """Its two factors are the same, so that no wavelength lies between them."""
    text = json.loads((CONFIGS / "Llama-4-Scout-17B-16E-Instruct.json").read_text())["text_config"]
    config = transformers.Llama4TextConfig(**without(text, "model_type"))
    kind = transformers.models.llama4.modeling_llama4.Llama4TextRotaryEmbedding
    with torch.device("meta"):
        rope = llama4_scout_17b_16e().layers[0].attn.rope
    rope.to_empty(device="cpu")
    assert rope.inverse_frequency.isfinite().all()
    assert torch.equal(rope.inverse_frequency, kind(config).inv_freq)
    plain = kind(transformers.Llama4TextConfig(head_dim=128)).inv_freq
    assert 0 < (plain != rope.inverse_frequency).sum() < 64


def test_temperature():
    positions = torch.tensor([[0, 1, 2, 3, 8190, 8191, 8192, 1_000_000]])
    found = PositionTemperature(floor=8192, strength=0.1)(positions)
    wanted = [1 + 0.1 * math.log(1 + (n + 1) // 8192) for n in positions[0].tolist()]
    assert found.dtype == torch.float32
    assert found[0].tolist() == pytest.approx(wanted, rel=1e-6)
    assert found[0, 4] == 1 < found[0, 5] == found[0, 6]
    with pytest.raises(InputError, match="floor is 0"):
        PositionTemperature(floor=0, strength=0.1)


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A model whose temperature rises every third position, beside transformers'."""
    return Models(tmp_path_factory.mktemp("llama4")).pair(CASE, "temperature")


def test_padding_on_the_left_changes_nothing(warm):
    """transformers' own would differ from its rows alone: it counts the padding."""
    lengths = torch.tensor([20, 13, 7])
    real = torch.arange(S) >= S - lengths[:, None]
    positions = (real.cumsum(1) - 1).clamp(min=0)
    tokens = torch.randint(0, 128, (B, S), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = warm.ours(tokens, mask=block_causal_mask(real.long()), input_pos=positions)
        padded = warm.hf(
            input_ids=tokens, attention_mask=real.long(), position_ids=positions
        ).logits
        for row, length in enumerate(lengths.tolist()):
            alone = warm.hf(input_ids=tokens[row : row + 1, S - length :]).logits[0]
            torch.testing.assert_close(ours[row, S - length :], alone, rtol=0, atol=1e-5)
    assert (padded - ours)[real].abs().max() > 1e-2


def test_chunks_and_temperature_follow_positions(warm):
    """A row that begins at position 5 is the end of a longer one, but for what it cannot see.

    It is as long as a chunk, but lies in two of them.
    """
    tokens = torch.randint(0, 128, (1, 13), generator=torch.Generator().manual_seed(2))
    start = 13 - CASE.tiny["attention_chunk_size"]
    positions = torch.arange(start, 13)[None]
    with torch.no_grad():
        late = warm.ours(tokens[:, start:], input_pos=positions)
        mask = torch.ones(1, 13, 13, dtype=torch.bool).tril()
        mask[:, start:, :start] = False
        whole = warm.ours(tokens, mask=mask, input_pos=torch.arange(13)[None])
        from_0 = warm.ours(tokens[:, start:])
    torch.testing.assert_close(late, whole[:, start:], rtol=0, atol=1e-5)
    assert (late - from_0).abs().max() > 1e-2


def test_large_logits_choose_as_in_transformers(tmp_path):
    """Logits, not their sigmoids, are compared: many of those are 1."""
    models = Models(tmp_path)
    pair = models.pair(CASE, "scout")
    tokens = torch.randint(0, 128, (B, S), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        for layer in pair.hf.model.layers:
            layer.feed_forward.router.weight.mul_(100)
        for layer in pair.ours.layers:
            layer.mlp.router.gate.weight.mul_(100)
        expected, found = pair.hf(input_ids=tokens).logits, pair.ours(tokens)
    logits = pair.ours.layers[0].mlp.last_routing.logits
    assert ((logits.sigmoid() == 1).sum(-1) > 1).any()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_rotation_in_bf16_is_transformers_to_the_bit(tmp_path):
    """It is done in fp32 between bf16 numbers."""
    hf = transformers.models.llama4.modeling_llama4
    pair = Models(tmp_path).pair(CASE, "scout")
    q = torch.randn(2, 4, S, 16, generator=torch.Generator().manual_seed(5)).bfloat16()
    positions = torch.arange(S)[None]
    turned = pair.ours.layers[0].attn.rope(q, positions)
    angles = pair.hf.model.rotary_emb(q, positions)
    expected, _ = hf.apply_rotary_emb(q.transpose(1, 2), q.transpose(1, 2), angles)
    assert torch.equal(turned, expected.transpose(1, 2))
