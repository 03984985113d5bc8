"""FLOPs against torch's own counter and against pencil and paper; published parameter counts."""

import pytest
import torch
from helpers_decoder import D, V, attention, decoder_of
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe_builders.attention import mla
from moe_builders.attention.gqa import GroupedQueryAttention
from moe_builders.attention.mla import MultiHeadLatentAttention
from moe_builders.data.batch import collate
from moe_builders.errors import InputError
from moe_builders.experts import GroupedExperts, grouped
from moe_builders.experts.expert_list import ExpertList, ExpertNetwork
from moe_builders.families import qwen3_moe
from moe_builders.flops import count_parameters, known_peak_tflops, model_flops
from moe_builders.moe import MoE, moe_layer
from moe_builders.routers import ExpertChoiceTopKRouter, TokenChoiceTopKRouter

B, S = 2, 12


def moe_mlp(**changes):
    def mlp(layer):
        arguments = {"embed_dim": D, "expert_hidden_dim": 8, "num_experts": 4,
                     "experts_per_token": 2}  # fmt: skip
        return moe_layer(**(arguments | changes))

    return mlp


def expert_choice(layer):
    router = ExpertChoiceTopKRouter(dim=D, num_experts=4, capacity_factor=1.5)  # 9 rows each
    return moe_layer(embed_dim=D, expert_hidden_dim=8, num_experts=4, router=router)


def biased(layer):
    return MoE(
        router=TokenChoiceTopKRouter(
            dim=D, num_experts=4, experts_per_token=2, gate_bias=True, expert_bias=True
        ),
        experts=GroupedExperts(dim=D, hidden_dim=8, num_experts=4),
    )


def biased_attention(layer):
    return GroupedQueryAttention(embed_dim=D, num_heads=4, num_kv_heads=2, head_dim=6, bias=True)


def latent_attention(**changes):
    def attention(layer):
        sizes = {"embed_dim": D, "num_heads": 4, "q_lora_rank": 10, "kv_lora_rank": 8,
                 "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 7}  # fmt: skip
        return MultiHeadLatentAttention(rope=None, **(sizes | changes))

    return attention


def ungated(layer):
    return MoE(
        router=ExpertChoiceTopKRouter(dim=D, num_experts=4, capacity_factor=1.0),
        experts=GroupedExperts(dim=D, hidden_dim=7, num_experts=4, activation="relu2"),
    )


def listed(layer):
    """Experts of one size: a token meets the same number of products whoever is chosen."""
    return MoE(
        router=TokenChoiceTopKRouter(dim=D, num_experts=3, experts_per_token=2),
        experts=ExpertList([ExpertNetwork(dim=D, hidden_dim=8, bias=True) for _ in range(3)]),
    )


MODELS = {
    "moe, dense, moe with shared experts": {},
    "tied": {"tie_word_embeddings": True},
    "gated shared experts": {"mlp": moe_mlp(shared_hidden_dim=16, shared_gate=True)},
    "one expert a token": {"mlp": moe_mlp(experts_per_token=1), "num_layers": 2},
    "all experts": {"mlp": moe_mlp(experts_per_token=4)},
    "biases": {"mlp": biased, "attention": biased_attention},
    "expert choice": {"mlp": expert_choice},
    "latent attention": {"attention": latent_attention()},
    "latent attention, one projection of q": {
        "attention": latent_attention(q_lora_rank=None, v_head_dim=13, bias=True)
    },
    "ungated": {"mlp": ungated, "num_layers": 1},
    "latent": {"mlp": moe_mlp(latent_dim=6, latent_bias=True, shared_hidden_dim=8)},
    "ungated shared": {"mlp": moe_mlp(shared_hidden_dim=8, shared_activation="relu2")},
    "a list": {"mlp": listed, "num_layers": 2},
}


def plain_grouped_mm(x, weight, counts, *, backend):
    """One product an expert, which the counter sees one by one."""
    runs = x.split(counts.tolist())
    return torch.cat([run @ matrix.t() for run, matrix in zip(runs, weight, strict=True)])


def counted(model, *, backward):
    tokens = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(0))
    # the math back end is plain products; the fused CPU kernel has no formula in the counter
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(tokens)
        if backward:
            logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("plain", [True, False], ids=["plain products", "our formula"])
@pytest.mark.parametrize("name", MODELS)
def test_torchs_counter_counts_the_same(name, plain, monkeypatch):
    """Exactly, once told that the math kernel computes all s·s pairs and not the causal ones."""
    if plain:
        monkeypatch.setattr(grouped, "grouped_mm", plain_grouped_mm)
    # zeros that a CPU's fused kernel is given are no work of the model's
    monkeypatch.setattr(mla, "equal_widths", lambda *tensors: tensors)
    model = decoder_of(**MODELS[name])
    ours = model_flops(model)
    step = {"num_tokens": B * S, "attended": B * S * S}
    assert counted(model, backward=False) == ours.forward(**step)
    assert counted(model, backward=True) == ours.training(**step) == 3 * ours.forward(**step)


def test_by_hand():
    """One layer: every product of it written out."""
    model = decoder_of(num_layers=1, mlp=moe_mlp(shared_hidden_dim=16, shared_gate=True))
    projections = D * 24 + 2 * D * 12 + 24 * D  # q; k and v; output
    gate, used, shared, shared_gate = D * 4, 2 * 3 * D * 8, 3 * D * 16, D
    per_token = 2 * (projections + gate + used + shared + shared_gate + D * V)
    flops = model_flops(model)
    assert flops.per_token == per_token
    assert flops.per_pair == 2 * 4 * 6 + 2 * 4 * 6  # scores; values: 4 heads of 6
    assert flops.forward(num_tokens=10, attended=55) == 10 * per_token + 55 * 96


def test_latent_attention_by_hand():
    bare = model_flops(decoder_of(num_layers=1, attention=lambda layer: NoAttention()))
    flops = model_flops(decoder_of(num_layers=1, attention=latent_attention()))
    queries = D * 10 + 10 * 4 * (6 + 4)  # down to the latent, up to the heads
    keys_values = D * (8 + 4) + 8 * 4 * (6 + 7)
    assert flops.per_token - bare.per_token == 2 * (queries + keys_values + 4 * 7 * D)
    assert flops.per_pair == 4 * (2 * (6 + 4) + 2 * 7)  # 4 heads: scores, values


def test_a_window_is_counted_as_if_it_were_none():
    """An upper bound, and said so (docs/logging.md)."""

    def windowed(layer):
        module = attention(layer)
        module.window = 3
        return module

    assert model_flops(decoder_of(attention=windowed)) == model_flops(decoder_of())


def test_attended_pairs_of_a_batch():
    rows = [
        {"tokens": [1] * 6, "labels": [1] * 6, "lengths": [4, 2]},
        {"tokens": [1] * 3, "labels": [1] * 3, "lengths": [3]},  # and three of padding
        None,
    ]
    batch = collate(rows, pad_id=0, packed=True)
    assert batch.attended_pairs == (10 + 3) + 6
    assert batch.attended_pairs == int((batch.attention_mask & batch.mask[..., None]).sum())
    whole = collate(rows[1:2], pad_id=0, length=5)
    assert whole.attended_pairs == 6


@pytest.mark.parametrize(
    ("build", "total", "active"),
    [
        # https://huggingface.co/Qwen/Qwen3-30B-A3B: 30.5B in all, 3.3B activated
        (qwen3_moe.qwen3_moe_30b_a3b, 30_532_122_624, 3.35e9),
        # https://huggingface.co/Qwen/Qwen3-235B-A22B: 235B in all, 22B activated
        (qwen3_moe.qwen3_moe_235b_a22b, 235_093_634_560, 22.19e9),
    ],
)
def test_published_parameter_counts(build, total, active):
    with torch.device("meta"):
        counts = count_parameters(build())
    assert counts.total == total
    assert counts.active == pytest.approx(active, rel=0.002)


def test_flops_per_token_of_a_release():
    """2 a parameter that a token meets, but for the embedding, which is a look-up."""
    with torch.device("meta"):
        model = qwen3_moe.qwen3_moe_30b_a3b()
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    met = count_parameters(model).active - model.tok_embeddings.weight.numel() - norms
    flops = model_flops(model)
    assert flops.per_token == 2 * met
    assert flops.per_pair == 48 * 4 * 32 * 128
    # NVIDIA's NeMo Automodel performance summary: 277 TFLOP/s at 12,040 tokens/s, rows of 4096
    row = flops.training(num_tokens=4096, attended=4096 * 4097 // 2)
    assert row / 4096 == pytest.approx(277e12 / 12_040, rel=0.005)


def test_biases_and_scales_of_experts_are_no_products():
    """They reach rows by a product with a 0/1 matrix, which is our way and no model's cost."""

    def build(**options):
        return decoder_of(num_layers=1, mlp=lambda layer: moe_of_width_d(**options))

    plain = model_flops(build())
    assert model_flops(build(bias=True)) == model_flops(build(hidden_scale=True)) == plain


def moe_of_width_d(**options):
    return MoE(
        router=TokenChoiceTopKRouter(dim=D, num_experts=4, experts_per_token=2),
        experts=GroupedExperts(dim=D, hidden_dim=8, num_experts=4, **options),
    )


def test_counts_of_tied_and_expert_choice_models():
    tied = decoder_of(tie_word_embeddings=True)
    untied = decoder_of()
    assert count_parameters(untied).total - count_parameters(tied).total == V * D
    model = decoder_of(mlp=expert_choice, num_layers=1)
    experts_hold = sum(p.numel() for p in model.layers[0].mlp.experts.parameters())
    counts = count_parameters(model)
    assert counts.total - counts.active == experts_hold * (1 - 1.5 / 4)


def test_parameters_that_a_token_meets():
    """Of lists and of hidden_scale its experts' share; of a latent space the projections whole."""
    k, e, h, n = 2, 4, 8, 6

    def active_part(mlp):
        model = decoder_of(num_layers=1, mlp=mlp)
        counts = count_parameters(model)
        return counts.total - counts.active

    one = 3 * D * h
    assert active_part(moe_mlp()) == (e - k) * one
    assert active_part(moe_mlp(hidden_scale=True)) == (e - k) * (one + h)
    assert active_part(moe_mlp(latent_dim=n, latent_bias=True)) == (e - k) * 3 * n * h
    assert active_part(listed) == (3 - k) * (one + 2 * h + D)


class NoAttention(nn.Module):
    num_heads = head_dim = 0


class OwnRouter(nn.Module):
    num_experts = 4


class OwnExperts(nn.Module):
    """A list of plain networks, for whoever has no use for batched ones."""

    def __init__(self):
        super().__init__()
        self.networks = nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(4))


def test_experts_of_ones_own_count_by_their_share():
    router = ExpertChoiceTopKRouter(dim=D, num_experts=4, capacity_factor=2)
    model = decoder_of(num_layers=1, mlp=lambda layer: MoE(router=router, experts=OwnExperts()))
    bare = decoder_of(num_layers=1, mlp=lambda layer: nn.Identity())
    extra = model_flops(model).per_token - model_flops(bare).per_token
    assert extra == 2 * (D * 4 + 2 * D * D)


def test_what_cannot_be_counted_is_said():
    own = decoder_of(num_layers=1, mlp=lambda layer: MoE(router=OwnRouter(), experts=OwnExperts()))
    with pytest.raises(InputError, match="router OwnRouter does not tell how many experts"):
        model_flops(own)
    model = decoder_of()
    model.layers[1].mlp = nn.Bilinear(D, D, D)
    with pytest.raises(InputError, match=r"FLOPs of layers\.1\.mlp \(Bilinear\) are not known"):
        model_flops(model)
    model = decoder_of(attention=lambda layer: attention(layer))
    del model.layers[0].attn.head_dim
    with pytest.raises(InputError, match="attention GroupedQueryAttention are not known"):
        model_flops(model)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989), ("NVIDIA B200", 2250), ("NVIDIA L40S", 362), ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("Tesla V100-SXM2-16GB", None), ("cpu", None),
    ],
)  # fmt: skip
def test_peaks(name, peak):
    assert known_peak_tflops(name) == peak
