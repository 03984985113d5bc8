"""The pooled form against the loss of transformers' models: over all layers, masked, from logits.

Letters: t tokens · e experts · k experts_per_token.
"""

import importlib
from dataclasses import replace

import pytest
import torch

from moe_builders.counts import count_assignments
from moe_builders.losses import load_balancing_loss, pooled_load_balancing_loss
from moe_builders.routing import TokenInfo, route_by_choice

transformers = pytest.importorskip("transformers")
NAMES = ["mixtral", "qwen3_moe", "olmoe", "qwen2_moe"]
B, S, E, K, LAYERS = 2, 13, 8, 3, 4


def their_loss(name):
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    return module.load_balancing_loss_func


def layers(seed, scale=2.0):
    stream = torch.Generator().manual_seed(seed)
    return [torch.randn(B * S, E, generator=stream) * scale for _ in range(LAYERS)]


def routing_of(logits, mask=None):
    probs = logits.softmax(-1)
    expert = probs.topk(K).indices
    return route_by_choice(
        expert=expert, weights=probs.gather(1, expert), logits=logits, probs=probs,
        info=TokenInfo(mask=None if mask is None else mask.flatten().bool()),
    )  # fmt: skip


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_theirs(name, masked):
    mask = (torch.arange(S) < torch.tensor([[9], [13]])).long() if masked else None
    for seed in range(5):
        theirs = [x.requires_grad_() for x in layers(seed)]
        ours = [x.requires_grad_() for x in layers(seed)]
        wanted = their_loss(name)(tuple(theirs), E, K, attention_mask=mask)
        got = pooled_load_balancing_loss([routing_of(x, mask) for x in ours])
        assert abs(float(got.detach() - wanted.detach())) <= 1e-6 * float(wanted.detach())
        got.backward()
        wanted.backward()
        for one, other in zip(ours, theirs, strict=True):
            assert (one.grad - other.grad).abs().max() <= 1e-6 * other.grad.abs().max()


def test_theirs_is_k_where_balanced_and_ours_1():
    equal = [torch.zeros(B * S, E) for _ in range(LAYERS)]
    assert float(their_loss("mixtral")(tuple(equal), E, K)) == pytest.approx(K, rel=1e-6)
    routings = [routing_of(x) for x in equal]
    assert float(pooled_load_balancing_loss(routings)) == pytest.approx(K, rel=1e-6)
    assert float(load_balancing_loss(routings[0], scope="micro")) == pytest.approx(1, rel=1e-6)


def test_one_layer_of_theirs_is_k_times_ours():
    """So a coefficient of theirs counts k times as much here."""
    (logits, *_) = layers(0)
    theirs = their_loss("mixtral")((logits,), E, K)
    ours = load_balancing_loss(routing_of(logits), scope="micro")
    assert float(theirs) == pytest.approx(K * float(ours), rel=1e-6)


def test_their_function_wants_logits():
    """A softmax of a softmax is nearly flat: a loss of it is nearly blind."""
    logits = layers(0, scale=5.0)
    right = float(their_loss("mixtral")(tuple(logits), E, K))
    twice = float(their_loss("mixtral")(tuple(x.softmax(-1) for x in logits), E, K))
    ours = float(pooled_load_balancing_loss([routing_of(x) for x in logits]))
    assert ours == pytest.approx(right, rel=1e-6)
    assert abs(twice - right) > 0.01


@pytest.mark.parametrize("name", ["Mixtral", "Olmoe"])
def test_a_whole_model_of_theirs(name):
    """What it adds to its loss is the pooled form of the logits that it reports."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": K,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "output_router_logits": True,
        "num_local_experts" if name == "Mixtral" else "num_experts": E,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "gate.weight" in parameter_name:
                parameter.normal_()
    tokens = torch.randint(3, 32, (B, S), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(S) < torch.tensor([[9], [13]])).long()
    with torch.no_grad():
        found = model(input_ids=tokens, attention_mask=mask)
    row_sums = found.router_logits[0].sum(-1)
    assert (row_sums - 1).abs().max() > 0.1, "logits, not probabilities"
    routings = [routing_of(x, mask) for x in found.router_logits]
    got = pooled_load_balancing_loss(routings)
    assert float(got) == pytest.approx(float(found.aux_loss), rel=1e-6)
    unmasked = [replace(r, info=TokenInfo()) for r in routings]
    assert int(count_assignments(unmasked[0]).sum()) == B * S * K
    assert abs(float(pooled_load_balancing_loss(unmasked) - got)) > 1e-4
