"""Latent attention against the softmax formula and against transformers' own modules."""

import helpers_decoder
import pytest
import torch
import transformers
from helpers import assert_near, assert_same_bits, gradients, randomise
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchtune.generation import generate
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
from transformers.models.glm4_moe_lite import modeling_glm4_moe_lite as glm

from moe_builders.attention.mla import MultiHeadLatentAttention, attend, score_scale
from moe_builders.attention.rope import RotaryEmbedding
from moe_builders.errors import InputError
from moe_builders.ops.masks import block_causal_mask

D, N, Z, P, R, W = 20, 4, 10, 6, 4, 8
BASE = 100.0
OURS = {
    "embed_dim": D, "num_heads": N, "q_lora_rank": 9, "kv_lora_rank": Z, "qk_nope_head_dim": P,
    "qk_rope_head_dim": R, "v_head_dim": W,
}  # fmt: skip


class TurnedPairs(nn.Module):
    """Rotary step of neighbouring pairs (2i, 2i + 1), as complex numbers; notes its calls."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, positions):
        self.calls.append((tuple(x.shape), tuple(positions.shape)))
        frequency = 1.0 / BASE ** (torch.arange(0, R, 2).float() / R)
        angle = positions[..., None].float() * frequency  # [b, s, r/2]
        wide = torch.promote_types(x.dtype, torch.float32)
        angle = angle[:, None].to(wide)
        factor = torch.complex(angle.cos(), angle.sin())
        pairs = torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * factor).flatten(-2).to(x.dtype)


class TurnedHalves(TurnedPairs):
    """The same for pairs (i, i + r/2)."""

    def forward(self, x, positions):
        paired = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        turned = super().forward(paired, positions)
        return turned.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def attention_of(dtype=torch.float64, **changes):
    arguments = OURS | {"rope": TurnedPairs()} | changes
    return randomise(MultiHeadLatentAttention(**arguments)).to(dtype)


PACKED = block_causal_mask(torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 2, 2]]))
GAPS = torch.tensor([[0, 1, 5, 0, 2, 3, 30], [4, 9, 0, 1, 2, 0, 1]])
CAUSAL = torch.ones(1, 7, 7, dtype=torch.bool).tril()


# ---------------------------------------------------------------- the formula


def plain_attention(attention, x, positions, allowed, *, scale, eps):
    """Paper's equations, one head and one position at a time."""

    def normed(v, norm):
        return v / (v.square().mean() + eps).sqrt() * norm.weight

    def project(layer, v):
        return layer.weight @ v + (0 if layer.bias is None else layer.bias)

    def turned(v, position):
        if attention.rope is None:
            return v
        return attention.rope(v[None, None, None], position.view(1, 1))[0, 0, 0]

    rows = []
    for b in range(x.shape[0]):
        keys, values, queries = [], [], []
        for i, v in enumerate(x[b]):
            if attention.q_lora_rank is None:
                q = project(attention.q_proj, v)
            else:
                q = project(attention.q_b_proj, normed(project(attention.q_a_proj, v),
                                                       attention.q_a_norm))  # fmt: skip
            down = project(attention.kv_a_proj, v)
            up = project(attention.kv_b_proj, normed(down[:Z], attention.kv_a_norm))
            q, up = q.view(N, P + R), up.view(N, P + W)
            key = turned(down[Z:], positions[b, i])
            queries.append([torch.cat((h[:P], turned(h[P:], positions[b, i]))) for h in q])
            keys.append([torch.cat((h[:P], key)) for h in up])
            values.append([h[P:] for h in up])
        for i in range(x.shape[1]):
            seen = [j for j in range(x.shape[1]) if allowed[b, i, j]]
            heads = []
            for n in range(N):
                share = torch.stack([scale * queries[i][n] @ keys[j][n] for j in seen]).exp()
                share = share / share.sum()
                heads.append(sum(p * values[j][n] for p, j in zip(share, seen, strict=True)))
            rows.append(project(attention.output_proj, torch.cat(heads)))
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None, "bias": True},
        {"bias": True, "scale": 0.9, "norm_eps": 0.1},
        {"rope": None},
    ],
    ids=str,
)
def test_the_formula(changes, packed):
    attention = attention_of(**changes)
    numbers = {"scale": changes.get("scale", (P + R) ** -0.5), "eps": changes.get("norm_eps", 1e-6)}
    ours = torch.randn(2, 7, D, dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    if packed:
        mask, positions = PACKED, GAPS
        got = attention(ours, mask=mask, input_pos=positions)
    else:
        mask, positions = CAUSAL.expand(2, 7, 7), torch.arange(7).expand(2, 7)
        got = attention(ours, ours)  # torchtune's layer passes x twice
    probe = torch.randn_like(got)
    (got * probe).sum().backward()
    grads = gradients(attention) | {"x": ours.grad}

    wanted = plain_attention(attention, theirs, positions, mask, **numbers)
    (wanted * probe).sum().backward()
    wanted_grads = gradients(attention) | {"x": theirs.grad}
    assert_near(got, wanted, 1e-10)
    for name, gradient in grads.items():
        assert_near(gradient, wanted_grads[name], 1e-10, name)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_by_differences(masked):
    attention = attention_of(bias=True)
    names = [name for name, _ in attention.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in attention.parameters()]
    x = torch.randn(1, 4, D, dtype=torch.float64, requires_grad=True)
    mask = PACKED[1:, :4, :4] if masked else None

    def forward(x, *parameters):
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(attention, named, (x,), {"mask": mask})

    assert torch.autograd.gradcheck(forward, (x, *values), fast_mode=True)


# ---------------------------------------------------------------- transformers' modules


def rows_of(theirs):
    names = {"kv_a_proj_with_mqa": "kv_a_proj", "o_proj": "output_proj",
             "q_a_layernorm": "q_a_norm", "kv_a_layernorm": "kv_a_norm"}  # fmt: skip
    for name, value in theirs.named_parameters():
        module, _, kind = name.rpartition(".")
        yield f"{names.get(module, module)}.{kind}", value


def make_pair(kind, *, yarn=False, dtype=torch.float32, **changes):
    """(ours, theirs, position embeddings of theirs) with the same random weights."""
    module, config_class, attention_class, rotary_class = {
        "v2": (v2, "DeepseekV2Config", "DeepseekV2Attention", "DeepseekV2RotaryEmbedding"),
        "v3": (v3, "DeepseekV3Config", "DeepseekV3Attention", "DeepseekV3RotaryEmbedding"),
        "glm": (glm, "Glm4MoeLiteConfig", "Glm4MoeLiteAttention", "Glm4MoeLiteRotaryEmbedding"),
    }[kind]
    rope = {"rope_type": "default", "rope_theta": BASE}
    fields = {key: value for key, value in OURS.items() if key.endswith(("_dim", "_rank"))}
    fields["hidden_size"] = fields.pop("embed_dim")
    config = getattr(transformers, config_class)(
        **(fields | {"num_attention_heads": N, "num_key_value_heads": N, "rms_norm_eps": 1e-2,
                     "rope_parameters": rope, "attn_implementation": "eager"} | changes)
    )  # fmt: skip
    rotary = getattr(module, rotary_class)(config)
    scale = None
    if yarn:  # only the scores' scale is ours here: the stand-in rope knows no YaRN
        config.rope_parameters |= {"rope_type": "yarn", "factor": 40.0, "mscale_all_dim": 0.7}
        mscale = 0.1 * 0.7 * torch.log(torch.tensor(40.0, dtype=torch.float64)) + 1
        scale = float((P + R) ** -0.5 * mscale**2)
    theirs = getattr(module, attention_class)(config, layer_idx=0)
    stream = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(1.0 if "layernorm" in name else 0.0, 0.3, generator=stream)
    halves = not changes.get("rope_interleave", True)
    ours = attention_of(
        torch.float32,
        rope=TurnedHalves() if halves else TurnedPairs(),
        q_lora_rank=config.q_lora_rank,
        bias=config.attention_bias,
        scale=scale,
    )
    ours.load_state_dict(dict(rows_of(theirs)))
    return ours.to(dtype), theirs.to(dtype), rotary


PAIRS = {
    "v2": ("v2", {}),
    "v2, one projection of q, biases": ("v2", {"q_lora_rank": None, "attention_bias": True}),
    "v3": ("v3", {}),
    "v3, YaRN's scale": ("v3", {"yarn": True}),
    "v3, biases": ("v3", {"attention_bias": True}),
    "v3, halves": ("v3", {"rope_interleave": False}),
    "glm4_moe_lite": ("glm", {}),
    "glm4_moe_lite, one projection of q": ("glm", {"q_lora_rank": None}),
}


def theirs_forward(theirs, rotary, x, positions, mask):
    low = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    out = theirs(
        hidden_states=x,
        position_embeddings=rotary(x, positions),
        attention_mask=low[:, None].to(x.dtype),
    )
    return out[0]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("kind", "changes"), PAIRS.values(), ids=PAIRS.keys())
def test_transformers_gives_the_same(kind, changes, packed):
    ours, theirs, rotary = make_pair(kind, **changes)
    mask = PACKED if packed else CAUSAL.expand(2, 7, 7)
    positions = GAPS if packed else torch.arange(7).expand(2, 7)
    x = torch.randn(2, 7, D, requires_grad=True)
    again = x.detach().clone().requires_grad_()
    got = ours(x, mask=mask, input_pos=positions) if packed else ours(x)
    wanted = theirs_forward(theirs, rotary, again, positions, mask)
    probe = torch.randn_like(got)
    (got * probe).sum().backward()
    (wanted * probe).sum().backward()
    assert_near(got, wanted, 2e-6)
    assert_near(x.grad, again.grad, 1e-5, "x")
    wanted_grads = {name: value.grad for name, value in rows_of(theirs)}
    grads = gradients(ours)
    assert grads.keys() == wanted_grads.keys()
    for name, gradient in grads.items():
        assert_near(gradient, wanted_grads[name], 1e-5, name)


def test_bf16_is_no_further_from_fp32_than_transformers():
    exact, _, _ = make_pair("v3")
    ours, theirs, rotary = make_pair("v3", dtype=torch.bfloat16)
    exact.load_state_dict({name: value.float() for name, value in ours.state_dict().items()})
    x = torch.randn(8, 7, D).bfloat16()
    positions = torch.arange(7).expand(8, 7)
    wanted = exact(x.float())
    far = (theirs_forward(theirs, rotary, x, positions, CAUSAL.expand(8, 7, 7)) - wanted).norm()
    for got in (ours(x), ours(x, mask=CAUSAL)):
        assert got.dtype == torch.bfloat16
        assert (got - wanted).norm() < 1.2 * far


# ---------------------------------------------------------------- the rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("widths", [(10, 8), (8, 10), (8, 8)])
def test_values_of_any_width(widths, masked, dtype):
    """Fused with zeros behind the narrower = plain products without."""
    u, w = widths
    q, k = (torch.randn(2, 3, 7, u, dtype=dtype) for _ in range(2))
    v = torch.randn(2, 3, 7, w, dtype=dtype)
    mask = PACKED if masked else CAUSAL
    scores = (q.double() @ k.double().transpose(2, 3) * 0.4).masked_fill(
        ~mask[:, None], float("-inf")
    )
    wanted = scores.softmax(-1) @ v.double()
    limit = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    got = attend(q, k, v, mask=PACKED if masked else None, scale=0.4)
    assert got.dtype == dtype
    assert_near(got.double(), wanted, limit)
    with sdpa_kernel(SDPBackend.MATH):
        got = attend(q, k, v, mask=PACKED if masked else None, scale=0.4)
    assert_near(got.double(), wanted, limit)


def test_the_cpu_takes_its_fused_kernel():
    x = torch.randn(1, 5, D)
    attention = attention_of(torch.float32)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # and no other
        attention(x).sum().backward()
        attention(x, mask=CAUSAL[:, :5, :5]).sum().backward()


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("lora", [9, None])
def test_decoding_with_a_cache(lora, masked):
    attention = attention_of(q_lora_rank=lora, bias=True)
    x = torch.randn(3, 9, D, dtype=torch.float64)
    shifts = torch.tensor([[0], [4], [30]])  # each row starts elsewhere
    wanted = attention(x, input_pos=torch.arange(9) + shifts)
    attention.setup_cache(3, torch.float64, max_seq_len=12)
    mask = torch.ones(1, 12, 12, dtype=torch.bool).tril()
    for _ in range(2):
        found, start = [], 0
        for length in (4, 1, 1, 2, 1):
            run = torch.arange(start, start + length)
            positions = run + shifts if length > 1 else (run + shifts)[:, 0]  # [b] of one step
            seen = mask[:, run] if masked else None
            found.append(attention(x[:, run], mask=seen, input_pos=positions))
            start += length
        assert_near(torch.cat(found, dim=1), wanted, 1e-12)
        assert attention.kv_cache.size == 9
        attention.reset_cache()
        assert attention.kv_cache.size == 0
    attention.cache_enabled = False
    assert_near(attention(x, input_pos=torch.arange(9) + shifts), wanted, 0)
    assert attention.kv_cache.size == 0


def test_the_cache_holds_latents_and_is_no_part_of_a_checkpoint():
    attention = attention_of(torch.float32)
    names = set(attention.state_dict())
    with torch.device("meta"):
        attention.setup_cache(2, torch.bfloat16, max_seq_len=5)
    cache = {name: (tuple(b.shape), b.dtype) for name, b in attention.kv_cache.named_buffers()}
    assert cache["k_cache"] == ((2, 1, 5, Z), torch.bfloat16)
    assert cache["v_cache"] == ((2, 1, 5, R), torch.bfloat16)
    assert attention.kv_cache.v_cache.is_meta
    assert set(attention.state_dict()) == names


def decoder_with_latents():
    """MoE, dense, MoE with shared experts, all with latent attention."""

    def latent(layer):
        sizes = OURS | {"embed_dim": helpers_decoder.D}
        return MultiHeadLatentAttention(**sizes, rope=TurnedPairs())

    return helpers_decoder.decoder_of(attention=latent, head_dim=P + R)


@pytest.mark.parametrize(
    "prompt",
    [[[3, 1, 4, 1, 5]], [[3, 1, 4], [2, 7, 1]], [[0, 0, 3, 1], [2, 7, 1, 8]], [[3], [2], [7]]],
    ids=["one", "batch", "left-padded", "one token each"],
)
def test_generating_with_a_cache_equals_without(prompt):
    prompt = torch.tensor(prompt)
    found = []
    for cached in (False, True):
        model = decoder_with_latents()
        if cached:
            model.setup_caches(prompt.shape[0], torch.float32, decoder_max_seq_len=20)
        stream = torch.Generator().manual_seed(0)
        found.append(
            generate(model, prompt, max_generated_tokens=6, pad_id=0, temperature=0.8, rng=stream)
        )
    (tokens, logits), (cached_tokens, cached_logits) = found
    assert torch.equal(cached_tokens, tokens)
    assert tokens[:, prompt.shape[1] :].unique().numel() > 1
    assert_near(cached_logits, logits, 1e-5)


def test_activation_checkpointing_changes_no_bit():
    tokens = torch.randint(0, helpers_decoder.V, (2, 10))
    found = []
    for checkpointed in (False, True):
        model = decoder_with_latents()
        model.activation_checkpointing = checkpointed
        model(tokens).square().sum().backward()
        found.append(gradients(model))
    assert_same_bits(*found)


def test_the_rope_sees_all_heads_of_q_and_the_one_of_k():
    attention = attention_of()
    attention(torch.randn(2, 7, D, dtype=torch.float64), input_pos=GAPS, mask=PACKED)
    attention(torch.randn(2, 7, D, dtype=torch.float64))
    assert attention.rope.calls == [
        ((2, N, 7, R), (2, 7)), ((2, 1, 7, R), (2, 7)),
        ((2, N, 7, R), (1, 7)), ((2, 1, 7, R), (1, 7)),
    ]  # fmt: skip


@pytest.mark.parametrize("lora", [9, None])
def test_names_and_shapes(lora):
    attention = attention_of(q_lora_rank=lora, bias=True)
    q = {"q_proj.weight": (N * (P + R), D)}
    if lora:
        q = {"q_a_proj.weight": (9, D), "q_a_proj.bias": (9,), "q_a_norm.weight": (9,),
             "q_b_proj.weight": (N * (P + R), 9)}  # fmt: skip
    assert {name: tuple(p.shape) for name, p in attention.named_parameters()} == q | {
        "kv_a_proj.weight": (Z + R, D), "kv_a_proj.bias": (Z + R,), "kv_a_norm.weight": (Z,),
        "kv_b_proj.weight": (N * (P + W), Z),
        "output_proj.weight": (D, N * W), "output_proj.bias": (D,),
    }  # fmt: skip
    assert (attention.num_heads, attention.head_dim, attention.v_head_dim) == (N, P + R, W)


def test_compiles_into_one_graph():
    attention = attention_of(torch.float32, rope=None)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 7, D)
    for mask in (None, PACKED):
        assert_near(compiled(x, mask=mask), attention(x, mask=mask), 1e-6)


@pytest.mark.parametrize(
    ("scaling", "config"),
    [
        (None, {"rope_type": "default"}),
        ({"rope_type": "yarn", "factor": 40.0, "mscale_all_dim": 0.707}, None),
        ({"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.0}, None),
        ({"rope_type": "yarn", "factor": 40.0, "mscale": 1.0}, None),
        ({"rope_type": "yarn", "factor": 1.0, "mscale_all_dim": 1.0}, None),
        ({"rope_type": "dynamic", "factor": 4.0, "mscale_all_dim": 0.5}, None),
    ],
)
def test_scale_of_the_scores(scaling, config):
    rope = RotaryEmbedding(head_dim=R, base=BASE, scaling=scaling, max_seq_len=64)
    expected = v2.yarn_apply_mscale(config or scaling, (P + R) ** -0.5)
    assert score_scale(P + R, rope) == pytest.approx(expected, rel=1e-15)


def test_refused():
    with pytest.raises(InputError, match=r"at least 1, but q_lora_rank is 0, v_head_dim is -1$"):
        attention_of(q_lora_rank=0, v_head_dim=-1)
    x = torch.randn(1, 2, D, dtype=torch.float64)
    with pytest.raises(InputError, match="self-attention"):
        attention_of()(x, x.clone())
    with pytest.raises(RuntimeError, match="setup_caches first"):
        attention_of().reset_cache()
