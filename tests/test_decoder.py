"""The whole decoder: what it must give whichever way it is called, packed, cached or recomputed."""

import pytest
import torch
from helpers import assert_near, assert_same_bits, gradients, randomise
from torch import nn
from torchtune.generation import generate
from torchtune.modules import TransformerDecoder

from moe_builders.attention.gqa import GroupedQueryAttention
from moe_builders.attention.rope import RotaryEmbedding
from moe_builders.decoder import initial_value, moe_decoder
from moe_builders.errors import InputError
from moe_builders.losses import cross_entropy_sum, load_balancing_loss, router_z_loss
from moe_builders.moe import collect_routing, moe_layer, shared_experts
from moe_builders.ops.masks import block_causal_mask
from moe_builders.routing import TokenInfo

V, D = 17, 12


def attention(layer):
    return GroupedQueryAttention(
        embed_dim=D,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        rope=RotaryEmbedding(head_dim=6, base=1000.0),
        q_norm=nn.RMSNorm(6, eps=1e-6),
        k_norm=nn.RMSNorm(6, eps=1e-6),
    )


def mlp(layer):
    if layer == 1:
        return shared_experts(embed_dim=D, shared_hidden_dim=16)
    return moe_layer(
        embed_dim=D,
        expert_hidden_dim=8,
        num_experts=4,
        experts_per_token=2,
        shared_hidden_dim=8 if layer else None,
    )


def decoder_of(dtype=torch.float32, **changes):
    """MoE, dense, MoE with shared experts."""
    arguments = {
        "vocab_size": V,
        "embed_dim": D,
        "num_layers": 3,
        "num_heads": 4,
        "head_dim": 6,
        "max_seq_len": 32,
        "attention": attention,
        "mlp": mlp,
    }
    model = moe_decoder(**(arguments | changes))
    return randomise(model).to(dtype)


def batch(b=2, s=10, *, seed=1):
    """Tokens and their TokenInfo; each row ends in padding."""
    stream = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (b, s), generator=stream)
    lengths = torch.randint(s // 2, s, (b, 1), generator=stream)
    mask = torch.arange(s) < lengths
    rows = torch.arange(b).repeat_interleave(s)
    return tokens, TokenInfo(mask=mask.flatten(), sequence_ids=rows, input_ids=tokens.flatten())


def losses(model, tokens, info):
    """Logits, and the step's loss with both router losses."""
    logits = model(tokens, info=info)
    labels = torch.where(info.mask.view_as(tokens), tokens, -100).roll(-1, 1)
    loss = cross_entropy_sum(logits, labels)
    for routing in collect_routing(model).values():
        loss = loss + load_balancing_loss(routing, scope="sequence") + router_z_loss(routing)
    return logits, loss


def run(model, tokens, info):
    logits, loss = losses(model, tokens, info)
    loss.backward()
    return {"logits": logits.detach(), "loss": loss.detach()} | gradients(model)


def test_recomputing_changes_no_bit():
    model = decoder_of()
    wanted = run(model, *batch())
    assert all(value.abs().sum() > 0 for value in wanted.values())
    model.activation_checkpointing = True
    assert_same_bits(run(model, *batch()), wanted)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_forwards_then_two_backwards(checkpointing):
    model = decoder_of()
    first, second = batch(seed=1), batch(seed=2)
    assert not torch.equal(first[1].mask, second[1].mask)
    wanted = run(model, *first), run(model, *second)

    model.activation_checkpointing = checkpointing
    outputs = losses(model, *first), losses(model, *second)
    last = collect_routing(model)
    for (logits, loss), separately in zip(outputs, wanted, strict=True):
        loss.backward()
        got = {"logits": logits.detach(), "loss": loss.detach()} | gradients(model)
        assert_same_bits(got, separately)
    # recomputation is no forward: its routing would also keep all that was recomputed in memory
    for name, routing in collect_routing(model).items():
        assert routing is last[name]
        assert routing.info.mask is second[1].mask


def test_nothing_is_recomputed_without_gradients():
    model = decoder_of()
    model.activation_checkpointing = True
    tokens, info = batch()
    with torch.no_grad():
        logits = model(tokens, info=info)
    assert torch.equal(logits, model(tokens, info=info).detach())


def test_tokens_alone_mean_all_real_and_a_document_a_row():
    model = decoder_of()
    tokens, _ = batch()
    alone = model(tokens)
    routing = collect_routing(model)
    explicit = TokenInfo(
        mask=torch.ones(20, dtype=torch.bool),
        sequence_ids=torch.tensor([0] * 10 + [1] * 10),
        input_ids=tokens.flatten(),
    )
    mask = torch.ones(2, 10, 10, dtype=torch.bool).tril()
    positions = torch.arange(10).expand(2, 10)
    assert_near(model(tokens, info=explicit, mask=mask, input_pos=positions), alone, 1e-5)
    assert torch.equal(model(tokens, info=explicit), alone)
    for name, after in collect_routing(model).items():
        before = routing[name]
        assert torch.equal(before.num_tokens_per_expert, after.num_tokens_per_expert)
        for scope in ("sequence", "micro"):
            got = load_balancing_loss(before, scope=scope)
            assert_near(got, load_balancing_loss(after, scope=scope), 1e-6)
        assert torch.equal(before.info.input_ids, tokens.flatten())


def test_padding_changes_nothing():
    model = decoder_of(torch.float64)
    tokens, info = batch()
    padded = model(tokens, info=info)
    counts = [r.num_tokens_per_expert for r in collect_routing(model).values()]
    balance = [
        load_balancing_loss(r, scope="sequence", num_tokens=1)
        for r in collect_routing(model).values()
    ]
    mask = info.mask.view(2, 10)
    for row in range(2):
        real = tokens[row : row + 1, mask[row]]
        assert_near(padded[row, mask[row]], model(real)[0], 1e-12)
        for number, routing in enumerate(collect_routing(model).values()):
            counts[number] = counts[number] - routing.num_tokens_per_expert
            alone = load_balancing_loss(routing, scope="sequence", num_tokens=1)
            balance[number] = balance[number] - alone
    for number in range(2):
        assert counts[number].tolist() == [0] * 4
        assert balance[number].abs() < 1e-10


def test_later_tokens_change_no_earlier_logits():
    model = decoder_of()
    tokens, _ = batch(b=3, s=12)
    before = model(tokens)
    tokens[:, 7:] = (tokens[:, 7:] + 5) % V
    after = model(tokens)
    assert_near(after[:, :7], before[:, :7], 1e-6)
    assert (after[:, 7:] - before[:, 7:]).abs().max() > 0.1


def test_packed_documents_equal_documents_one_by_one():
    model = decoder_of()
    lengths = [5, 1, 8]
    documents = [torch.randint(0, V, (1, n)) for n in lengths]
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    packed = model(
        torch.cat(documents, 1),
        mask=block_causal_mask(ids),
        input_pos=torch.cat([torch.arange(n) for n in lengths])[None],
        info=TokenInfo(sequence_ids=ids.flatten()),
    )
    balance = [
        load_balancing_loss(r, scope="sequence").detach() for r in collect_routing(model).values()
    ]
    alone = [model(document) for document in documents]
    assert_near(packed, torch.cat(alone, 1), 1e-5)
    for layer, got in enumerate(balance):
        wanted = 0
        for document in documents:
            model(document)
            routing = list(collect_routing(model).values())[layer]
            wanted += load_balancing_loss(routing, scope="sequence", num_tokens=14).detach()
        assert_near(got, wanted, 1e-5)


def sampled(model, prompt, cached):
    if cached:
        model.setup_caches(prompt.shape[0], torch.float32, decoder_max_seq_len=20)
    tokens, logits = generate(
        model,
        prompt,
        max_generated_tokens=6,
        pad_id=0,
        temperature=0.8,
        rng=torch.Generator().manual_seed(0),
    )
    return tokens, logits


@pytest.mark.parametrize("prompt", ["one", "batch", "left-padded", "one token", "one token each"])
def test_generating_with_a_cache_equals_without(prompt):
    prompt = {
        "one": torch.tensor([3, 1, 4, 1, 5]),
        "batch": torch.tensor([[3, 1, 4], [2, 7, 1]]),
        "left-padded": torch.tensor([[0, 0, 3, 1], [2, 7, 1, 8]]),
        "one token": torch.tensor([3]),
        "one token each": torch.tensor([[3], [2], [7]]),
    }[prompt]
    prompt = prompt.view(-1, prompt.shape[-1])
    tokens, logits = sampled(decoder_of(), prompt, cached=False)
    cached_tokens, cached_logits = sampled(decoder_of(), prompt, cached=True)
    assert torch.equal(cached_tokens, tokens)
    assert tokens[:, prompt.shape[1] :].unique().numel() > 1
    assert_near(cached_logits, logits, 1e-5)


class TestParts:
    def test_it_is_torchtunes_decoder(self):
        assert isinstance(decoder_of(), TransformerDecoder)

    def test_one_module_is_copied_for_each_layer(self):
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

    def test_tied_embeddings(self):
        model = decoder_of(tie_word_embeddings=True)
        tokens, _ = batch()
        logits = model(tokens)
        seen = []
        model.norm.register_forward_hook(lambda m, args, out: seen.append(out))
        model(tokens)
        assert_near(logits, seen[0] @ model.tok_embeddings.weight.t(), 1e-6)
        names = [name for name, _ in model.named_parameters()]
        assert "output.weight" not in names

    @pytest.mark.parametrize(
        ("dtype", "wide"),
        [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
    )
    def test_logits_are_fp32_or_wider(self, dtype, wide):
        assert decoder_of(dtype)(batch()[0]).dtype == wide

    def test_chunks_of_logits(self):
        model = decoder_of()
        tokens, _ = batch()
        whole = model(tokens)
        model.set_num_output_chunks(3)
        assert_near(torch.cat(model(tokens), 1), whole, 1e-6)

    def test_refused(self):
        with pytest.raises(InputError, match="num_layers is 0"):
            decoder_of(num_layers=0)
        with pytest.raises(ValueError, match="max_seq_len"):
            decoder_of()(torch.zeros(1, 33, dtype=torch.int64))

    def test_initial_values(self):
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
        assert (
            initial_value("layers.0.sa_norm.weight", torch.empty(4), seed=3).tolist() == [1.0] * 4
        )
        for name in ("attn.q_proj.bias", "mlp.router.expert_bias", "mlp.experts.down_bias"):
            assert not initial_value(name, torch.empty(4), seed=3).any()
