"""What released models add to grouped-query attention, each against the formula written out."""

import math

import pytest
import torch
from helpers import assert_near, gradients, randomise
from torch import nn

from moe_builders.attention.gqa import GroupedQueryAttention
from moe_builders.attention.rope import RotaryEmbedding
from moe_builders.errors import InputError
from moe_builders.ops.masks import block_causal_mask

D, R, S = 10, 4, 9


def full_norm(heads: int) -> nn.RMSNorm:
    return nn.RMSNorm(heads * R, eps=1e-6)


OPTIONS = {
    "window": {"window": 3},
    "window of two": {"window": 2},
    "window of all": {"window": S},
    "chunk": {"chunk": 4},
    "window and chunk": {"window": 3, "chunk": 4},
    "sinks": {"sinks": True},
    "sinks, window, scale": {"sinks": True, "window": 4, "scale": 0.3},
    "scale": {"scale": 0.7},
    "clip": {"clip_qkv": 0.5},
    "query scale": {"query_scale": lambda positions: 1 + 0.5 * positions.double()},
    "full norms": {"q_norm": full_norm(4), "k_norm": full_norm(2), "norm_width": "full"},
    "full norms, clip": {
        "q_norm": full_norm(4), "k_norm": full_norm(2), "norm_width": "full", "clip_qkv": 0.8,
    },
    "norm after rope": {
        "q_norm": nn.RMSNorm(R, eps=1e-6), "k_norm": nn.RMSNorm(R, eps=1e-6),
        "norm_after_rope": True,
    },
    "biases but not on the output": {"bias": True, "output_bias": False},
    "bias on the output alone": {"bias": False, "output_bias": True},
}  # fmt: skip


def attention_of(**options) -> GroupedQueryAttention:
    torch.manual_seed(0)
    options = {"rope": RotaryEmbedding(head_dim=R, base=100.0)} | options
    options = {"head_dim": R} | options
    attention = GroupedQueryAttention(embed_dim=D, num_heads=4, num_kv_heads=2, **options)
    return randomise(attention).double()


def plain(attention: GroupedQueryAttention, x, positions, allowed, options) -> torch.Tensor:
    """All pairs of one row, head by head, with what the options say spelled out."""

    def heads_of(name: str, heads: int, norm) -> torch.Tensor:
        y = getattr(attention, f"{name}_proj")(x)  # [s, heads·r]
        late = options.get("norm_after_rope", False)
        if norm is not None and options.get("norm_width") == "full":
            y = norm(y)
        y = y.view(S, heads, R)
        if norm is not None and options.get("norm_width") != "full" and not late:
            y = norm(y)
        if "clip_qkv" in options:
            limit = torch.tensor(options["clip_qkv"], dtype=y.dtype)
            y = torch.minimum(torch.maximum(y, -limit), limit)
        if name != "v":
            y = attention.rope(y.transpose(0, 1)[None], positions[None])[0].transpose(0, 1)
            y = norm(y) if late else y
        return y

    q = heads_of("q", 4, attention.q_norm)
    k, v = heads_of("k", 2, attention.k_norm), heads_of("v", 2, None)
    if "query_scale" in options:
        q = q * options["query_scale"](positions)[:, None, None]
    rows = []
    for i in range(S):
        seen = [j for j in range(S) if allowed[i, j]]
        seen = [j for j in seen if i - j < options.get("window", S)]
        chunk = options.get("chunk", 10**6)
        seen = [j for j in seen if int(positions[i]) // chunk == int(positions[j]) // chunk]
        heads = []
        for head in range(4):
            scale = options.get("scale", 1 / math.sqrt(R))
            scores = torch.stack([scale * (q[i, head] @ k[j, head // 2]) for j in seen])
            weights = scores.exp()
            total = weights.sum()
            if options.get("sinks"):
                total = total + attention.sinks[head].exp()
            heads.append((weights / total) @ torch.stack([v[j, head // 2] for j in seen]))
        rows.append(attention.output_proj(torch.cat(heads)))
    return torch.stack(rows)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("packed", [False, True])
def test_the_formula(name, packed):
    options = OPTIONS[name]
    attention = attention_of(**options)
    x = torch.randn(2, S, D, dtype=torch.float64)
    documents = torch.tensor([[0] * 3 + [1] * 6, [0] * 7 + [1] * 2])
    positions = torch.cat([torch.arange(n) for n in (3, 6, 7, 2)]).view(2, S)
    if packed:
        allowed = block_causal_mask(documents)
        got = attention(x, mask=allowed, input_pos=positions)
    else:
        allowed = torch.ones(2, S, S, dtype=torch.bool).tril()
        positions = torch.arange(S).expand(2, S)
        got = attention(x)
    probe = torch.randn_like(got)
    (got * probe).sum().backward()
    found = gradients(attention)
    wanted = torch.stack(
        [plain(attention, x[b], positions[b], allowed[b], options) for b in range(2)]
    )
    (wanted * probe).sum().backward()
    assert_near(got.detach(), wanted.detach(), 1e-10)
    for key, gradient in gradients(attention).items():
        assert_near(found[key], gradient, 1e-10, key)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_cached_steps_are_the_whole_row(name, masked):
    attention = attention_of(**OPTIONS[name])
    x = torch.randn(1, S, D, dtype=torch.float64)
    with torch.no_grad():
        wanted = attention(x)
        attention.setup_cache(1, torch.float64, S + 3)
        steps = []
        seen = torch.ones(S + 3, S + 3, dtype=torch.bool).tril()
        for first, last in ((0, 4), *((n, n + 1) for n in range(4, S))):
            mask = seen[None, first:last] if masked else None
            steps.append(
                attention(x[:, first:last], mask=mask, input_pos=torch.arange(first, last))
            )
    assert_near(torch.cat(steps, 1), wanted, 1e-10)


@pytest.mark.parametrize("name", OPTIONS)
def test_cached_steps_after_padding_on_the_left(name):
    """Positions begin with the document, places in the cache with the padding."""
    attention, pads = attention_of(**OPTIONS[name]), torch.tensor([0, 2, 5])
    x = torch.randn(3, S, D, dtype=torch.float64)
    places = torch.arange(S + 3)
    real = (places >= pads[:, None])[:, None]  # [b, 1, c]
    mask = (places[:, None] >= places) & real | (places[:, None] == places)  # padding sees itself
    positions = (torch.arange(S) - pads[:, None]).clamp(min=0)
    with torch.no_grad():
        wanted = [attention(x[n : n + 1, pad:]) for n, pad in enumerate(pads)]
        attention.setup_cache(3, torch.float64, S + 3)
        runs = ((0, 6), (6, 7), *((n, n + 1) for n in range(7, S)))
        steps = [
            attention(x[:, a:b], mask=mask[:, a:b], input_pos=positions[:, a:b]) for a, b in runs
        ]
    found = torch.cat(steps, 1)
    for n, pad in enumerate(pads):
        assert_near(found[n : n + 1, pad:], wanted[n], 1e-10)


@pytest.mark.parametrize("name", ["window", "chunk", "sinks"])
def test_the_option_is_seen(name):
    x = torch.randn(1, S, D, dtype=torch.float64)
    assert (attention_of(**OPTIONS[name])(x) - attention_of()(x)).abs().max() > 1e-2


def test_padding_on_the_left_moves_nothing():
    """Chunks count positions, windows places: both are the same seen from the document."""
    attention = attention_of(window=3, chunk=4, sinks=True)
    x = torch.randn(1, S, D, dtype=torch.float64)
    padded = torch.cat((torch.randn(1, 2, D, dtype=torch.float64), x), 1)
    documents = torch.tensor([[0, 0] + [1] * S])
    positions = torch.tensor([[0, 0, *range(S)]])
    got = attention(padded, mask=block_causal_mask(documents), input_pos=positions)
    assert_near(got[:, 2:], attention(x), 1e-10)


def test_dropout_is_for_training_alone():
    attention = attention_of(dropout=0.5)
    x = torch.randn(1, S, D, dtype=torch.float64)
    torch.manual_seed(1)
    first, second = attention(x), attention(x)
    assert not torch.equal(first, second)
    assert torch.equal(attention.eval()(x), attention_of().eval()(x))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head_dim": 0}, "head_dim is 0, but must be at least 1"),
        ({"window": 0}, "window is 0, but must be at least 1"),
        ({"chunk": -1}, "chunk is -1, but must be at least 1"),
        ({"dropout": 1.0}, "dropout is 1.0, but must be at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout is -0.1, but must be at least 0 and below 1"),
        ({"norm_width": "half"}, "norm_width 'half' is not one of head, full"),
        ({"norm_width": "full", "norm_after_rope": True}, "needs norm_width 'head'"),
    ],
)
def test_mistakes(options, words):
    with pytest.raises(InputError, match=words):
        attention_of(**options)


def test_compiles_without_a_break():
    attention = attention_of(window=3, sinks=True, chunk=4).float()
    x = torch.randn(2, S, D)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert_near(compiled(x), attention(x), 1e-6)


def test_query_scale_is_applied_in_the_wider_dtype():
    """1.03 is no bf16 number: rounding it first would turn the scores by its error."""
    seen = {}

    def attend(q, k, v, mask):
        seen["q"] = q
        return q

    factors = torch.tensor([[1.0, 1.03, 1.51]])
    attention = attention_of(rope=None, query_scale=lambda positions: factors).bfloat16()
    attention._attend = attend
    x = torch.randn(1, 3, D, dtype=torch.bfloat16)
    attention(x)
    q = attention.q_proj(x).unflatten(-1, (4, R)).transpose(1, 2)
    assert seen["q"].dtype == torch.bfloat16
    assert torch.equal(seen["q"], (q.float() * factors[:, None, :, None]).bfloat16())
    assert not torch.equal(seen["q"], q * factors.bfloat16()[:, None, :, None])
