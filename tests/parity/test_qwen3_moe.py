"""Qwen3-MoE against transformers: the same numbers from the same folder, forward and backward.

Letters: b rows · s positions · v vocabulary.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hf_helpers import (
    draw_tokens,
    hf_gradients,
    load_hf,
    our_gradients,
    smallest_margin,
    write_hf_folder,
)
from torch import Tensor

from moe_builders.hub import load_hf_model
from moe_builders.moe import collect_routing
from moe_builders.ops.masks import block_causal_mask
from moe_builders.routing import TokenInfo

VARIANTS = {
    "plain": {},
    # head_dim is not hidden / heads; an eps large enough to be seen
    "gqa": {"num_key_value_heads": 2, "head_dim": 24, "rms_norm_eps": 1e-3},
    "dense_first": {"mlp_only_layers": [0]},
    "dense_interleaved": {
        "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1],
    },
    "tied": {"tie_word_embeddings": True},
    "bias": {"attention_bias": True, "num_key_value_heads": 2},
    "unnormalised": {"norm_topk_prob": False},
}  # fmt: skip
B, S = 3, 20
LENGTHS = torch.tensor([20, 13, 7])


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("hf")
    return write_hf_folder(path, **VARIANTS[getattr(request, "param", "gqa")])


@pytest.fixture
def pair(folder):
    """Fresh models of both kinds."""
    return SimpleNamespace(hf=load_hf(folder), ours=load_hf_model(folder)[0])


def loss_of(logits: Tensor, tokens: Tensor, real: Tensor) -> Tensor:
    """Next-token cross-entropy over pairs of real tokens, documents being rows: [b, s, v] -> []."""
    labels = tokens[:, 1:].masked_fill(~(real[:, 1:] & real[:, :-1]), -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())


def assert_same(pair, real: Tensor, hf_inputs: dict, our_inputs: dict) -> None:
    """Logits of real tokens to 1e-5, and every parameter's gradient to 1e-5 of its largest."""
    tokens = draw_tokens(
        B, S, lambda ids: smallest_margin(pair.hf, real, input_ids=ids, **hf_inputs)
    )
    theirs = pair.hf(input_ids=tokens, **hf_inputs).logits
    ours = pair.ours(tokens, **our_inputs)
    assert ours.dtype == torch.float32
    assert theirs[real].std() > 0.3  # not a comparison of nothings
    torch.testing.assert_close(ours[real], theirs[real], rtol=0, atol=1e-5)
    loss_of(theirs, tokens, real).backward()
    loss_of(ours, tokens, real).backward()
    assert_same_gradients(pair)


def assert_same_gradients(pair) -> None:
    expected, found = hf_gradients(pair.hf), our_gradients(pair.ours)
    assert found.keys() == expected.keys()
    errors = {
        name: float((found[name] - grad).abs().max() / largest_of_kind(expected, name))
        for name, grad in expected.items()
    }
    assert not {name: error for name, error in errors.items() if not error <= 1e-5}


def largest_of_kind(gradients: dict[str, Tensor], name: str) -> Tensor:
    """Largest entry of a gradient; for an expert, of all experts of the layer (one may idle)."""
    stem, experts, rest = name.partition(".experts.")
    kind = rest.partition(".")[2]
    return max(
        grad.abs().max()
        for other, grad in gradients.items()
        if other == name or (experts and other.startswith(stem + experts) and other.endswith(kind))
    )


@pytest.mark.parametrize("folder", VARIANTS, indirect=True)
def test_variant(pair):
    assert_same(pair, torch.ones(B, S, dtype=torch.bool), {}, {})


def test_right_padding(pair):
    real = torch.arange(S) < LENGTHS[:, None]  # [b, s]
    info = TokenInfo(mask=real.flatten())
    assert_same(pair, real, {"attention_mask": real.long()}, {"info": info})
    for routing in collect_routing(pair.ours).values():
        assert routing.num_tokens_per_expert.sum() == 3 * real.sum()  # padding goes nowhere


def test_left_padding(pair):
    real = torch.arange(S) >= S - LENGTHS[:, None]  # [b, s]
    positions = (real.cumsum(1) - 1).clamp(min=0)
    assert_same(
        pair,
        real,
        {"attention_mask": real.long(), "position_ids": positions},
        {
            "mask": block_causal_mask(real.long()),  # [b, s, s], padding is a document of its own
            "input_pos": positions,
            "info": TokenInfo(mask=real.flatten()),
        },
    )


def test_positions_with_gaps(pair):
    """Rotation is relative: only uneven steps show whether positions are used at all."""
    steps = torch.randint(1, 4, (B, S), generator=torch.Generator().manual_seed(3))
    positions = steps.cumsum(1)  # [b, s]
    real = torch.ones(B, S, dtype=torch.bool)
    assert_same(pair, real, {"position_ids": positions}, {"input_pos": positions})


def test_packed_documents_are_documents_one_by_one(pair):
    lengths = (9, 4, 1, 6)
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))  # [s]
    positions = torch.cat([torch.arange(n) for n in lengths])
    documents = torch.arange(sum(lengths)).split(lengths)
    row = draw_tokens(
        1,
        sum(lengths),
        lambda ids: min(
            smallest_margin(pair.hf, torch.ones(len(d), dtype=torch.bool), input_ids=ids[:, d])
            for d in documents
        ),
    )
    packed = pair.ours(
        row,
        mask=block_causal_mask(ids[None]),
        input_pos=positions[None],
        info=TokenInfo(sequence_ids=ids, input_ids=row[0]),
    )
    packed.square().mean().backward()
    for document in documents:
        alone = pair.hf(input_ids=row[:, document]).logits
        torch.testing.assert_close(packed[:, document], alone, rtol=0, atol=1e-5)
        (alone.square().sum() / packed.numel()).backward()
    assert_same_gradients(pair)


def test_bf16_is_as_near_to_fp32_as_transformers_is(folder):
    tokens = torch.randint(0, 128, (8, 40), generator=torch.Generator().manual_seed(2))
    ours, _ = load_hf_model(folder, dtype=torch.bfloat16)
    narrow = {p.dtype for n, p in ours.named_parameters() if ".router." not in n}
    assert narrow == {torch.bfloat16}
    with torch.no_grad():
        exact = load_hf(folder)(input_ids=tokens).logits
        theirs = load_hf(folder, dtype=torch.bfloat16)(input_ids=tokens).logits.float()
        found = ours(tokens)
    own_distance = (theirs - exact).abs().mean()
    assert own_distance > 1e-3
    assert 1e-3 < (found - exact).abs().mean() <= 1.5 * own_distance
    assert (found - theirs).abs().mean() <= 2 * own_distance


def test_bf16_folder_gives_bf16_parameters(folder, tmp_path):
    write_hf_folder(tmp_path, dtype=torch.bfloat16)
    model, _ = load_hf_model(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.zeros(1, 2, dtype=torch.int64)).dtype == torch.float32


def _swap_gate_and_up(layer) -> None:
    weight = layer.mlp.experts.gate_up_proj
    weight.data = torch.cat(weight.data.chunk(2, dim=1)[::-1], dim=1)


def _norm_after_rope(layer) -> None:
    attention = layer.attn
    norms = {heads: norm for heads, norm in ((4, attention.q_norm), (2, attention.k_norm))}
    attention.q_norm = attention.k_norm = None
    rope = attention.rope
    attention.rope = None
    del attention._modules["rope"]
    attention.rope = lambda x, positions: norms[x.shape[1]](rope(x, positions))


MUTATIONS = {
    "no q_norm": lambda layer: setattr(layer.attn, "q_norm", None),
    "no k_norm": lambda layer: setattr(layer.attn, "k_norm", None),
    "no rope": lambda layer: setattr(layer.attn, "rope", None),
    "norms after rope": _norm_after_rope,
    "rope base": lambda layer: layer.attn.rope.inverse_frequency.mul_(0.5),
    "weights not normalised": lambda layer: setattr(layer.mlp.router, "normalize_weights", False),
    "gate and up swapped": _swap_gate_and_up,
    "experts reversed": lambda layer: setattr(
        layer.mlp.experts.down_proj, "data", layer.mlp.experts.down_proj.data.flip(0)
    ),
    "norms swapped": lambda layer: layer._modules.update(
        sa_norm=layer.mlp_norm, mlp_norm=layer.sa_norm
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mistake_would_be_seen(pair, mutation):
    tokens = torch.arange(B * S).view(B, S)
    with torch.no_grad():
        before = pair.ours(tokens)
        for layer in pair.ours.layers:
            MUTATIONS[mutation](layer)
        after = pair.ours(tokens)
    assert (after - before).abs().max() > 1e-2
