"""The whole decoder: what it must give whichever way it is called, packed, cached or recomputed."""

from collections import Counter

import pytest
import torch
from helpers import assert_near, assert_same_bits, gradients
from helpers_decoder import V, batch, decoder_of
from torchtune.generation import generate

from moe_builders.errors import InputError
from moe_builders.losses import cross_entropy_sum, load_balancing_loss, router_z_loss
from moe_builders.moe import collect_routing
from moe_builders.ops.masks import block_causal_mask
from moe_builders.routing import TokenInfo


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
    forwards = []
    model.layers[0].sa_norm.register_forward_hook(lambda *_: forwards.append(1))
    model.activation_checkpointing = True
    assert_same_bits(run(model, *batch()), wanted)
    assert len(forwards) == 2  # it was recomputed


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


def test_selective_recomputes_all_but_experts_and_changes_no_bit():
    model = decoder_of()
    wanted = run(model, *batch())
    counts = Counter()
    for name, module in model.named_modules():
        if name.endswith(("attn", "sa_norm", "mlp_norm", "mlp", "router", "experts")):
            module.register_forward_pre_hook(lambda *_, name=name: counts.update([name]))
    model.activation_checkpointing, model.ac_mode = True, "selective"
    assert_same_bits(run(model, *batch()), wanted)
    for number, dense in enumerate((False, True, False)):
        layer = f"layers.{number}."
        assert counts[f"{layer}attn"] == counts[f"{layer}sa_norm"] == 2
        assert counts[f"{layer}mlp"] == counts[f"{layer}mlp_norm"] == 1 + dense
        assert dense or counts[f"{layer}mlp.router"] == counts[f"{layer}mlp.experts"] == 1


def test_an_unknown_mode_is_refused():
    model = decoder_of()
    model.activation_checkpointing, model.ac_mode = True, "some"
    with pytest.raises(InputError, match=r"^ac_mode 'some' is not one of full, selective$"):
        model(batch()[0])


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_nothing_is_recomputed_without_gradients(mode):
    model = decoder_of()
    model.activation_checkpointing, model.ac_mode = True, mode
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
