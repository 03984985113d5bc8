"""The decoder's assembly: copies, ties, output types, chunks, first values."""

import pytest
import torch
from helpers import assert_near, gradients
from helpers_decoder import D, V, attention, batch, decoder_of, mlp
from helpers_memory import largest_allocation
from torch import nn
from torchtune.modules import TransformerDecoder

from moe_builders.decoder import moe_decoder
from moe_builders.errors import InputError
from moe_builders.initialization import initial_value
from moe_builders.losses import IGNORE_INDEX, cross_entropy_sum


def test_it_is_torchtunes_decoder():
    assert isinstance(decoder_of(), TransformerDecoder)


def test_one_module_is_copied_for_each_layer():
    model = moe_decoder(
        vocab_size=V,
        embed_dim=D,
        num_layers=2,
        num_heads=4,
        head_dim=6,
        max_seq_len=32,
        attention=attention(0),
        mlp=mlp(0),
    )
    first, second = (layer.mlp.experts.down_proj for layer in model.layers)
    assert first is not second
    assert torch.equal(first, second)


def test_tied_embeddings():
    model = decoder_of(tie_word_embeddings=True)
    tokens, _ = batch()
    logits = model(tokens)
    seen = []
    model.norm.register_forward_hook(lambda m, args, out: seen.append(out))
    model(tokens)
    assert_near(logits, seen[0] @ model.tok_embeddings.weight.t(), 1e-6)
    names = [name for name, _ in model.named_parameters()]
    assert "output.weight" not in names


def test_an_output_with_a_bias():
    model, tokens = decoder_of(output_bias=True), batch()[0]
    logits = model(tokens)
    model.output.bias.data += torch.arange(model.output.out_features)
    assert_near(model(tokens), logits + torch.arange(model.output.out_features), 1e-5)
    assert decoder_of().output.bias is None
    with pytest.raises(InputError, match="has no bias of its own: untie them"):
        decoder_of(output_bias=True, tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_logits_are_fp32_or_wider(dtype, wide):
    assert decoder_of(dtype)(batch()[0]).dtype == wide


def test_chunks_of_logits():
    model = decoder_of()
    tokens, _ = batch()
    whole = model(tokens)
    model.set_num_output_chunks(3)
    assert_near(torch.cat(model(tokens), 1), whole, 1e-6)


LABELS = torch.randint(0, V, (2, 10), generator=torch.Generator().manual_seed(2))
LABELS[0, 3:] = IGNORE_INDEX


@pytest.mark.parametrize("chunks", [0, 3])
@pytest.mark.parametrize("way", ["chunked", "none", "torch"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, {"output_bias": True}, {"logits_scale": 0.3}],
    ids=["usual", "tied", "bias", "scaled"],
)
def test_a_loss_is_the_cross_entropy_of_the_logits(changes, way, chunks):
    if way == "torch" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this torch has none")
    model = decoder_of(torch.float64, **changes)
    tokens, info = batch()
    wanted = cross_entropy_sum(model(tokens, info=info), LABELS) / 7
    wanted.backward()
    usual = gradients(model)
    model.linear_cross_entropy = way
    model.set_num_output_chunks(chunks)
    loss = model(tokens, info=info, labels=LABELS, divisor=torch.tensor(7))
    loss.backward()
    assert_near(loss, wanted, 1e-13)
    for name, gradient in gradients(model).items():
        assert_near(gradient, usual[name], 1e-10, name)
    with torch.no_grad():
        assert_near(model(tokens, info=info, labels=LABELS), 7 * wanted, 1e-13)


def test_a_loss_of_chunks_in_bf16_is_summed_in_fp32():
    model, (tokens, info) = decoder_of(torch.bfloat16), batch()
    model.linear_cross_entropy = "none"
    whole = model(tokens, info=info, labels=LABELS)
    model.set_num_output_chunks(3)
    chunks = model(tokens, info=info, labels=LABELS)
    assert chunks.dtype == torch.float32
    assert_near(chunks, whole, 1e-6)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_logits_in_a_forward_with_labels_nor_its_backward(dtype, recomputed):
    """A vocabulary that outweighs all else; 600 tokens are several chunks of it."""
    model = decoder_of(dtype, vocab_size=9000, max_seq_len=600)
    model.activation_checkpointing = recomputed
    tokens = torch.randint(0, 9000, (1, 600))
    for way, whole in (("chunked", False), ("none", True)):
        model.linear_cross_entropy = way
        most = largest_allocation(lambda: model(tokens, labels=tokens).backward())
        assert (most >= 600 * 9000 * dtype.itemsize) == whole, most


def test_without_its_output_layer():
    model, (tokens, info) = decoder_of(), batch()
    hidden = model(tokens, info=info, labels=LABELS, skip_output_layer=True)
    assert_near(model.output(hidden), model(tokens, info=info), 1e-6)


def test_an_output_of_ones_own_has_logits_only():
    model, (tokens, _) = decoder_of(), batch()
    model.output = nn.Sequential(model.output, nn.Tanh())
    with pytest.raises(InputError, match=r"^the output is a Sequential, .* linear_cross_entropy=n"):
        model(tokens, labels=LABELS)
    model.linear_cross_entropy = "none"
    wanted = cross_entropy_sum(model(tokens), LABELS)
    assert_near(model(tokens, labels=LABELS), wanted, 1e-6)


def test_refused():
    with pytest.raises(InputError, match="num_layers is 0"):
        decoder_of(num_layers=0)
    with pytest.raises(ValueError, match="max_seq_len"):
        decoder_of()(torch.zeros(1, 33, dtype=torch.int64))


def test_initial_values():
    like = torch.empty(200, 50)
    value = initial_value("layers.0.mlp.experts.down_proj", like, seed=3)
    assert value.std().item() == pytest.approx(0.02, rel=0.05)
    assert abs(value.mean().item()) < 1e-3
    again = initial_value("layers.0.mlp.experts.down_proj", like, seed=3)
    assert torch.equal(value, again)
    for name, seed in (("layers.1.mlp.experts.down_proj", 3), ("output.weight", 3)):
        assert not torch.equal(initial_value(name, like, seed=seed), value)
    other = initial_value("layers.0.mlp.experts.down_proj", like, seed=4)
    assert not torch.equal(other, value)
    assert initial_value("layers.0.sa_norm.weight", torch.empty(4), seed=3).tolist() == [1.0] * 4
    for name in ("attn.q_proj.bias", "mlp.router.expert_bias", "mlp.experts.down_bias"):
        assert not initial_value(name, torch.empty(4), seed=3).any()


def test_scales_multiply_embeddings_branches_and_logits():
    model, scaled = decoder_of(), decoder_of(embedding_scale=3.0, logits_scale=0.25)
    tokens, _ = batch()
    seen = []
    scaled.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    scaled(tokens)
    assert_near(seen[0], 3 * scaled.tok_embeddings(tokens), 1e-6)
    scaled.embedding_scale = 1.0
    assert_near(scaled(tokens), 0.25 * model(tokens), 1e-6)
    scaled.set_num_output_chunks(3)
    assert_near(torch.cat(scaled(tokens), 1), 0.25 * model(tokens), 1e-6)
    layer = decoder_of(residual_scale=0.22).layers[0]
    x = torch.randn(2, 5, D)
    h = x + 0.22 * layer.attn(layer.sa_norm(x))
    assert_near(layer(x), h + 0.22 * layer.mlp(layer.mlp_norm(h)), 1e-6)


def test_norms_after_the_branches():
    layer = decoder_of(norm_position="after").layers[0]
    names = {name for name, _ in layer.named_parameters() if "norm" in name or "scale" in name}
    assert {"sa_scale.weight", "mlp_scale.weight"} <= names
    assert not names & {"sa_norm.weight", "mlp_norm.weight"}
    torch.nn.init.normal_(layer.sa_scale.weight)
    torch.nn.init.normal_(layer.mlp_scale.weight)
    x = torch.randn(2, 5, D)
    h = x + layer.sa_scale(layer.attn(x))
    assert_near(layer(x), h + layer.mlp_scale(layer.mlp(h)), 1e-6)
    value = initial_value("layers.0.sa_scale.weight", layer.sa_scale.weight, seed=1)
    assert torch.equal(value, torch.ones(D))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"norm_position": "between"}, "norm_position 'between' is not one of before, after"),
        ({"norm_position": "after", "residual_scale": 0.5}, "needs norm_position 'before'"),
    ],
)
def test_norm_mistakes(options, words):
    with pytest.raises(InputError, match=words):
        decoder_of(**options)
