"""Grouped-query attention against the softmax formula, one head and one position at a time."""

import math

import pytest
import torch
from helpers import assert_near, gradients, randomise
from torch import nn

from moe_builders.attention.gqa import GroupedQueryAttention
from moe_builders.attention.rope import RotaryEmbedding
from moe_builders.errors import InputError
from moe_builders.ops.masks import block_causal_mask

D, R = 10, 4


def attention_of(heads=4, kv_heads=2, *, norms=True, rope=True, bias=True, dtype=torch.float64):
    attention = GroupedQueryAttention(
        embed_dim=D,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=R,
        rope=RotaryEmbedding(head_dim=R, base=100.0) if rope else None,
        q_norm=nn.RMSNorm(R, eps=1e-6) if norms else None,
        k_norm=nn.RMSNorm(R, eps=1e-6) if norms else None,
        bias=bias,
    )
    return randomise(attention).to(dtype)


def turn(v, position, base=100.0):
    """Rotary step of one vector [r] as complex numbers v_i + i·v_{i + r/2}, each turned."""
    half = v.shape[0] // 2
    frequency = 1.0 / base ** (torch.arange(0, 2 * half, 2).float() / (2 * half))
    angle = float(position) * frequency  # fp32, as released models have it
    factor = torch.complex(angle.cos().to(v.dtype), angle.sin().to(v.dtype))
    turned = torch.complex(v[:half], v[half:]) * factor
    return torch.cat((turned.real, turned.imag))


def plain_attention(attention, x, positions, allowed):
    """Sum over the positions j that i may see of softmax(q·k/√r)·v."""

    def project(name, vector, head):
        layer = getattr(attention, f"{name}_proj")
        rows = slice(head * R, (head + 1) * R)
        found = layer.weight[rows] @ vector + (0 if layer.bias is None else layer.bias[rows])
        norm = getattr(attention, f"{name}_norm", None)
        if norm is not None:
            found = found / (found.square().mean() + 1e-6).sqrt() * norm.weight
        return found

    rows = []
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            heads = []
            for head in range(attention.num_heads):
                kv = head // (attention.num_heads // attention.num_kv_heads)
                q, scores, values = project("q", x[b, i], head), [], []
                seen = [j for j in range(x.shape[1]) if allowed[b, i, j]]
                for j in seen:
                    k = project("k", x[b, j], kv)
                    if attention.rope is not None:
                        k = turn(k, positions[b, j])
                    q_turned = q if attention.rope is None else turn(q, positions[b, i])
                    scores.append((q_turned @ k) / math.sqrt(R))
                    values.append(project("v", x[b, j], kv))
                share = torch.stack(scores).exp()
                share = share / share.sum()
                heads.append(sum(s * v for s, v in zip(share, values, strict=True)))
            out = attention.output_proj
            row = out.weight @ torch.cat(heads)
            rows.append(row if out.bias is None else row + out.bias)
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "norms", "rope", "bias"),
    [
        (4, 2, True, True, True),
        (4, 4, True, True, False),
        (4, 1, False, True, False),
        (2, 2, False, False, False),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_the_formula(heads, kv_heads, norms, rope, bias, packed):
    attention = attention_of(heads, kv_heads, norms=norms, rope=rope, bias=bias)
    ours = torch.randn(2, 6, D, dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    if packed:
        documents = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
        mask = block_causal_mask(documents)
        positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]])
        got = attention(ours, mask=mask, input_pos=positions)
    else:
        mask = torch.ones(2, 6, 6, dtype=torch.bool).tril()
        positions = torch.arange(6).expand(2, 6)
        got = attention(ours, ours)  # torchtune's layer passes x twice
    probe = torch.randn_like(got)
    (got * probe).sum().backward()
    grads = gradients(attention) | {"x": ours.grad}

    wanted = plain_attention(attention, theirs, positions, mask)
    (wanted * probe).sum().backward()
    wanted_grads = gradients(attention) | {"x": theirs.grad}
    assert_near(got.detach(), wanted.detach(), 1e-10)
    for name, gradient in grads.items():
        assert_near(gradient, wanted_grads[name], 1e-10, name)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 5)])
def test_rope_turns_complex_numbers(shape):
    rope = RotaryEmbedding(head_dim=8, base=10_000.0)
    x = torch.randn(3, 2, 5, 8, dtype=torch.float64)
    positions = torch.randint(0, 3000, shape)
    batched = positions.reshape(-1, 5)
    got = rope(x, batched)
    batched = batched.expand(3, 5)
    for b in range(3):
        for n in range(2):
            for s in range(5):
                assert_near(got[b, n, s], turn(x[b, n, s], batched[b, s], 10_000.0), 1e-12)


def test_rope_angles_are_the_papers():
    rope = RotaryEmbedding(head_dim=8, base=10_000.0)
    for i, frequency in enumerate(rope.inverse_frequency.tolist()):
        assert frequency == pytest.approx(10_000 ** (-2 * i / 8), rel=1e-6)
    x = torch.zeros(1, 1, 2, 8)
    x[..., 1] = 1.0
    turned = rope(x, torch.tensor([[0, 7]]))[0, 0]
    assert torch.equal(turned[0], x[0, 0, 0])
    angle = 7 * 10_000 ** (-2 / 8)
    assert turned[1, 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
    assert turned[1, 5].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_rope_scores_depend_on_distance_only():
    rope = RotaryEmbedding(head_dim=8, base=10_000.0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(i, j):
        return (rope(q, torch.tensor([[i]])) * rope(k, torch.tensor([[j]]))).sum()

    assert_near(score(40, 25), score(15, 0), 1e-5)
    assert (score(40, 25) - score(40, 26)).abs() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rope_frequencies_stay_exact_through_to(dtype):
    attention = attention_of(dtype=torch.float32)
    wanted = attention.rope.inverse_frequency.clone()
    attention.to(dtype)
    assert attention.q_proj.weight.dtype == dtype
    assert torch.equal(attention.rope.inverse_frequency, wanted)
    assert attention.rope.inverse_frequency.dtype == torch.float32
    assert "rope.inverse_frequency" not in attention.state_dict()


def test_rope_from_the_meta_device():
    with torch.device("meta"):
        rope = RotaryEmbedding(head_dim=8, base=10_000.0)
    rope.to_empty(device="cpu")
    rope.rope_init()
    wanted = RotaryEmbedding(head_dim=8, base=10_000.0)
    assert torch.equal(rope.inverse_frequency, wanted.inverse_frequency)


def test_documents_see_their_own_past():
    documents = torch.tensor([[0, 0, 1, 1, 2]])
    assert block_causal_mask(documents)[0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize("positions", ["[s]", "[b, s]", "one step: [b]", "one step: []"])
def test_the_shapes_of_positions_that_generation_uses(positions):
    attention = attention_of()
    x = torch.randn(3, 5, D, dtype=torch.float64)
    if positions == "[s]":
        got = attention(x, input_pos=torch.arange(5) + 2)
        wanted = attention(x, input_pos=(torch.arange(5) + 2).expand(3, 5))
    elif positions == "[b, s]":
        shifts = torch.arange(5) + torch.tensor([[0], [4], [9]])
        got = attention(x, input_pos=shifts)
        wanted = torch.cat([attention(x[b : b + 1], input_pos=shifts[b]) for b in range(3)])
    else:
        attention.setup_cache(3, torch.float64, max_seq_len=6)
        mask = torch.ones(3, 6, 6, dtype=torch.bool).tril()
        at = torch.tensor([5, 4, 7]) if positions == "one step: [b]" else torch.tensor(5)
        attention(x, mask=mask[:, :5], input_pos=torch.arange(5))
        got = attention(x[:, :1], mask=mask[:, 5:], input_pos=at)
        attention.reset_cache()
        attention(x, mask=mask[:, :5], input_pos=torch.arange(5))
        wanted = attention(x[:, :1], mask=mask[:, 5:], input_pos=at.expand(3)[:, None])
    assert_near(got, wanted, 1e-12)


def test_refused():
    with pytest.raises(InputError, match=r"num_kv_heads is 3, but must divide num_heads \(4\)"):
        attention_of(4, 3)
    with pytest.raises(InputError, match="num_kv_heads is 0"):
        attention_of(4, 0)
    with pytest.raises(InputError, match="head_dim is 5, but rotary"):
        RotaryEmbedding(head_dim=5, base=100.0)
    x = torch.randn(1, 2, D, dtype=torch.float64)
    with pytest.raises(InputError, match="self-attention"):
        attention_of()(x, x.clone())
    with pytest.raises(RuntimeError, match="setup_caches first"):
        attention_of().reset_cache()
