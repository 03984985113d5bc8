"""Attention and decoders that are told where documents end: what a mask would give, without one.

Letters: b rows · s positions · d dim.
"""

import pytest
import torch
from helpers import assert_near, assert_same_bits, gradients, quick, randomise
from helpers_decoder import D as WIDE
from helpers_decoder import V, decoder_of
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moe_builders.attention.gqa import GroupedQueryAttention
from moe_builders.attention.mla import MultiHeadLatentAttention
from moe_builders.attention.rope import RotaryEmbedding
from moe_builders.attention.temperature import PositionTemperature
from moe_builders.data.batch import collate
from moe_builders.errors import InputError
from moe_builders.losses import cross_entropy_sum
from moe_builders.moe import collect_routing
from moe_builders.ops import attend_documents as operator

D, R, S = 10, 4, 80
OPTIONS = {
    "plain": {},
    "norms": {"q_norm": nn.RMSNorm(R), "k_norm": nn.RMSNorm(R)},
    "window": {"window": 3},
    "chunk": {"chunk": 5},
    "sinks": {"sinks": True},
    "gpt-oss": {"window": 7, "sinks": True, "bias": True, "scale": 0.3},
    "llama 4": {"chunk": 16, "norm_after_rope": True, "q_norm": nn.RMSNorm(R),
                "query_scale": PositionTemperature(floor=3, strength=0.1)},
}  # fmt: skip
ROWS = ([30, 1, 1, 48], [80], [5, 7, 2])  # the last ends in padding


def gqa(**options):
    options = {"rope": RotaryEmbedding(head_dim=R, base=100.0)} | options
    attention = GroupedQueryAttention(
        embed_dim=D, num_heads=4, num_kv_heads=2, head_dim=R, **options
    )
    return randomise(attention).double()


def mla(v_head_dim=6):
    attention = MultiHeadLatentAttention(
        embed_dim=D, num_heads=3, q_lora_rank=6, kv_lora_rank=5, qk_nope_head_dim=4,
        qk_rope_head_dim=4, v_head_dim=v_head_dim, rope=RotaryEmbedding(head_dim=4, base=100.0),
    )  # fmt: skip
    return randomise(attention).double()


def packed(*rows, s=S):
    stream = torch.Generator().manual_seed(0)
    samples = []
    for lengths in rows:
        tokens = torch.randint(0, V, (sum(lengths),), generator=stream).tolist()
        samples.append({"tokens": tokens, "labels": tokens, "lengths": list(lengths)})
    return collate(samples, pad_id=0, packed=True, length=s)


def answers(attention, x, mask, positions, probe):
    x = x.clone().requires_grad_()
    out = attention(x, mask=mask, input_pos=positions)
    (out * probe).sum().backward()
    return {"out": out.detach(), "x": x.grad} | gradients(attention)


ATTENTIONS = {name: lambda options=options: gqa(**options) for name, options in OPTIONS.items()}
ATTENTIONS |= {"latent": mla, "latent, wide values": lambda: mla(v_head_dim=11)}


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_documents_are_what_their_mask_is(kind):
    attention, batch = ATTENTIONS[kind](), packed(*ROWS)
    x, probe = torch.randn(2, 3, S, D, dtype=torch.float64)
    given = x, batch.documents, batch.positions, probe
    got = answers(attention, *given)
    wanted = answers(attention, x, batch.attention_mask, batch.positions, probe)
    for name, value in wanted.items():
        assert_near(got[name], value, 1e-12, name)
    assert got["out"].isfinite().all(), "padding too"


@pytest.mark.parametrize("kind", ["window", "sinks", "gpt-oss", "chunk"])
def test_whole_rows_need_no_mask_either(kind, monkeypatch):
    attention = ATTENTIONS[kind]()
    x, probe = torch.randn(2, 3, S, D, dtype=torch.float64)
    got = answers(attention, x, None, None, probe)
    causal = torch.ones(3, S, S, dtype=torch.bool).tril()
    wanted = answers(attention, x, causal, None, probe)
    for name, value in wanted.items():
        assert_near(got[name], value, 1e-12, name)
    monkeypatch.setattr("moe_builders.attention.gqa.causal_mask", None)
    attention(x)  # makes none


def test_chunks_go_by_the_positions_that_rows_are_given():
    attention, x = gqa(chunk=4), torch.randn(1, 9, D, dtype=torch.float64)
    moved = attention(x, input_pos=torch.arange(9) + 2)  # the first chunk is 2, 3
    causal = torch.ones(1, 9, 9, dtype=torch.bool).tril()
    assert_near(moved, attention(x, mask=causal, input_pos=torch.arange(9) + 2), 1e-12)
    assert (moved - attention(x)).abs().max() > 1e-3


@quick
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_a_document_is_as_if_it_stood_alone(lengths):
    s = sum(lengths)
    attention, batch = gqa(window=9), packed(lengths, s=s)
    x = torch.randn(1, s, D, dtype=torch.float64)
    together = attention(x, mask=batch.documents, input_pos=batch.positions)
    alone = [attention(part) for part in x.split(lengths, 1)]
    assert_near(together, torch.cat(alone, 1), 1e-12)


def test_where_there_is_no_way_without_a_mask_one_is_made(monkeypatch):
    attention, latent, batch = gqa(window=9), mla(), packed(*ROWS)
    x = torch.randn(3, S, D, dtype=torch.float64)
    wanted = [
        f(x, mask=batch.attention_mask, input_pos=batch.positions) for f in (attention, latent)
    ]
    monkeypatch.setattr("moe_builders.attention.gqa.can_attend_documents", lambda q: False)
    monkeypatch.setattr("moe_builders.attention.mla.can_attend_documents", lambda q: False)
    monkeypatch.setattr(operator, "attend_pieces", None)
    got = [f(x, mask=batch.documents, input_pos=batch.positions) for f in (attention, latent)]
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


def test_dropout_draws_as_with_a_mask():
    attention, batch = gqa(dropout=0.5).train(), packed(*ROWS)
    x = torch.randn(3, S, D, dtype=torch.float64)
    found = []
    for mask in (batch.documents, batch.attention_mask):
        torch.manual_seed(0)
        found.append(attention(x, mask=mask, input_pos=batch.positions))
    assert torch.equal(*found)
    attention.eval()
    assert (
        attention(x, mask=batch.documents, input_pos=batch.positions) - found[0]
    ).abs().max() > 0


@pytest.mark.parametrize("attention", [gqa, mla])
def test_a_cache_wants_a_mask(attention):
    attention, batch = attention(), packed([80])
    attention.setup_cache(1, torch.float64, max_seq_len=S)
    with pytest.raises(InputError, match="documents do not go with a key/value cache: give"):
        attention(torch.randn(1, S, D).double(), mask=batch.documents, input_pos=batch.positions)


def step(model, batch, mask):
    logits = model(batch.tokens, mask=mask, input_pos=batch.positions, info=batch.info)
    loss = cross_entropy_sum(logits, batch.labels)
    loss.backward()
    counts = [r.num_tokens_per_expert for r in collect_routing(model).values()]
    return {"logits": logits.detach(), "loss": loss.detach()} | gradients(model), counts


def test_a_decoder_learns_the_same():
    model, batch = decoder_of(torch.float64, max_seq_len=S), packed(*ROWS)
    got, counts = step(model, batch, batch.attention_for(model))
    wanted, wanted_counts = step(model, batch, batch.attention_mask)
    assert all(map(torch.equal, counts, wanted_counts))
    for name, value in wanted.items():
        assert_near(got[name], value, 1e-10, name)
    model.activation_checkpointing = True
    assert_same_bits(step(model, batch, batch.documents)[0], got)


class Masked(nn.Module):
    """Somebody's attention that knows masks only."""

    cache_enabled = False

    def __init__(self):
        super().__init__()
        self.inner = GroupedQueryAttention(embed_dim=WIDE, num_heads=4, num_kv_heads=2, head_dim=6)
        self.seen = None

    def forward(self, x, y=None, *, mask=None, input_pos=None):
        self.seen = mask
        return self.inner(x, y, mask=mask, input_pos=input_pos)


def test_an_attention_of_ones_own_gets_the_mask():
    model, batch = decoder_of(attention=lambda layer: Masked(), max_seq_len=S), packed(*ROWS)
    model(batch.tokens, mask=batch.documents, input_pos=batch.positions, info=batch.info)
    for layer in model.layers:
        assert torch.equal(layer.attn.seen, batch.attention_mask)


class Squares(TorchDispatchMode):
    """Every tensor [..., s, s] that an operator gives."""

    found = ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.shape[-2:] == (S, S):
                self.found += (func,)
        return out


def test_no_mask_is_made_for_packed_rows():
    model, batch = decoder_of(max_seq_len=S), packed(*ROWS)
    with Squares() as seen:
        step(model, batch, batch.attention_for(model))
    assert seen.found == ()
    with Squares() as seen:
        step(model, batch, batch.attention_mask)
    assert seen.found, "or this test could not fail"


def test_compiled_layers_serve_every_packing():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter, model = CompileCounter(), decoder_of(torch.float64, max_seq_len=S)
    layer = model.layers[2]
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(3, S, WIDE, dtype=torch.float64)
    for rows in (ROWS, ([1] * S, [80], [79]), ([40, 40], [40], [])):
        batch = packed(*rows)
        given = {"mask": batch.documents, "input_pos": batch.positions, "info": batch.info}
        assert_near(compiled(x, **given), layer(x, **given), 1e-10)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["chunk", "window"])
def test_documents_mean_the_same_without_an_operator(kind, monkeypatch):
    """Each begins a chunk, also where rows are given no positions."""
    attention, x = gqa(**OPTIONS[kind]), torch.randn(2, S, D, dtype=torch.float64)
    documents = packed([30, 1, 1, 48], [7, 73]).documents
    wanted = attention(x, mask=documents)
    monkeypatch.setattr("moe_builders.attention.gqa.can_attend_documents", lambda q: False)
    assert_near(attention(x, mask=documents), wanted, 1e-12)
