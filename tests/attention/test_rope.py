"""Rotary frequencies, tables and products against transformers' own, to the last bit where layouts
agree; what is refused; what depends on the length."""

import importlib
import math

import pytest
import torch
from helpers import assert_near
from transformers import AutoConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_get_mscale
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding

from moe_builders.attention.rope import SCALING_KEYS, RotaryEmbedding, yarn_mscale
from moe_builders.errors import InputError

YARN40 = {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
          "beta_fast": 32, "beta_slow": 1}  # fmt: skip
YARN32 = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096,
          "beta_slow": 1.0}  # fmt: skip
YARN4 = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "original_max_position_embeddings": 4096,
            "short_factor": [1 + i / 30 for i in range(24)],
            "long_factor": [1 + i**1.5 for i in range(24)]}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
INERT = {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
SCOUT = {**LLAMA3, "factor": 16.0, "high_freq_factor": 1.0}
GPT_OSS = {**YARN32, "beta_fast": 32.0, "truncate": False}
KIMI = {**YARN32, "beta_fast": 1, "mscale": 1.0, "mscale_all_dim": 1.0}


def without(mapping, *names):
    return {key: value for key, value in mapping.items() if key not in names}


# name: (dims of a head, base, scaling, fraction, max_position_embeddings)
CASES = {
    "default": (128, 1e6, None, 1.0, 40960),
    "default by name": (128, 1e4, {"rope_type": "default"}, 1.0, 40960),
    "half of glm-4.5": (128, 1e6, None, 0.5, 131072),
    "linear": (64, 1e4, {"rope_type": "linear", "factor": 4.0}, 1.0, 8192),
    "linear, 0.25": (64, 1e4, {"rope_type": "linear", "factor": 2.5}, 0.25, 8192),
    "deepseek-v2": (64, 1e4, {**YARN40, "mscale": 0.707, "mscale_all_dim": 0.707}, 1.0, 163840),
    "deepseek-v3": (64, 1e4, {**YARN40, "mscale": 1.0, "mscale_all_dim": 1.0}, 1.0, 163840),
    "two mscales": (64, 1e4, {**YARN40, "mscale": 0.707, "mscale_all_dim": 1.2}, 1.0, 163840),
    "one mscale": (64, 1e4, {**YARN40, "mscale": 0.707}, 1.0, 163840),
    "mscale 0": (64, 1e4, {**YARN40, "mscale": 0.7, "mscale_all_dim": 0}, 1.0, 163840),
    "kimi-k2": (64, 5e4, KIMI, 1.0, 131072),
    "gpt-oss": (64, 150000, GPT_OSS, 1.0, 131072),
    "yarn, no ramp": (64, 1e4, {**GPT_OSS, "beta_fast": 1.0}, 1.0, 131072),
    "yarn, no original": (128, 1e6, YARN4, 1.0, 32768),
    "yarn, factor by lengths": (64, 1e4, {**YARN40, "factor": None}, 1.0, 163840),
    "yarn, attention factor": (64, 1e4, {**YARN40, "attention_factor": 1.5}, 1.0, 163840),
    "yarn, nulls": (64, 1e4, {**YARN40, "beta_fast": None, "mscale": None}, 1.0, 163840),
    "yarn, factor 1": (64, 1e4, {**YARN4, "factor": 1}, 1.0, 4096),
    "yarn, short original": (16, 1e4, {**YARN4, "original_max_position_embeddings": 4}, 1.0, 16),
    "yarn, long original": (
        16, 1e2, {**YARN4, "original_max_position_embeddings": 10**6, "beta_fast": 32000}, 1.0,
        4 * 10**6),
    "yarn, half": (128, 1e6, YARN4, 0.5, 32768),
    "llama 3.1": (128, 5e5, LLAMA3, 1.0, 131072),
    "llama 4 scout": (128, 5e5, SCOUT, 1.0, 10485760),
    "llama3, no original": (
        64, 5e5, without(LLAMA3, "original_max_position_embeddings"), 1.0, 4096),
    "llama3, half": (128, 5e5, LLAMA3, 0.5, 131072),
    "longrope": (48, 1e4, LONGROPE, 1.0, 131072),
    "longrope, factor": (48, 1e4, {**LONGROPE, "factor": 8}, 1.0, 131072),
    "longrope, factor 1": (48, 1e4, {**LONGROPE, "factor": 1.0}, 1.0, 131072),
    "longrope, attention factor": (
        48, 1e4, {**LONGROPE, "factor": 8, "attention_factor": 1.25}, 1.0, 131072),
    "longrope, no original": (
        48, 1e4, without(LONGROPE, "original_max_position_embeddings"), 1.0, 2048),
    "longrope, original beyond": (48, 1e4, LONGROPE, 1.0, 2048),
    "longrope, half": (96, 1e4, LONGROPE, 0.5, 131072),
    "dynamic": (128, 1e4, DYNAMIC, 1.0, 2048),
    "dynamic, whole factor": (64, 1e6, {**DYNAMIC, "factor": 4}, 1.0, 4096),
    "dynamic, odd factor": (64, 1e4, {**DYNAMIC, "factor": 1.1}, 1.0, 1000),
    "dynamic, half": (64, 1e4, DYNAMIC, 0.5, 2048),
    "dynamic, inert keys": (128, 1e4, {**DYNAMIC, **INERT}, 1.0, 2048),
}  # fmt: skip
EVERY = pytest.mark.parametrize("case", list(CASES))


def ours(case, **kwargs):
    head_dim, base, scaling, fraction, length = CASES[case]
    return RotaryEmbedding(head_dim=head_dim, base=base, scaling=scaling, fraction=fraction,
                           max_seq_len=length, **kwargs)  # fmt: skip


def theirs(case):
    """A fresh config; no case's mapping is shared with it (transformers fills mappings in)."""
    head_dim, base, scaling, fraction, length = CASES[case]
    parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": base}
    if fraction != 1:
        parameters["partial_rotary_factor"] = fraction
    return LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim,
                       max_position_embeddings=length, rope_parameters=parameters)  # fmt: skip


def tables(rope, positions, dtype):
    """Cos and sin [b, s, r/2] by turning pairs (1, 0); layout of two halves."""
    x = torch.zeros(positions.shape[0], 1, positions.shape[1], rope.head_dim, dtype=dtype)
    half = rope.dims // 2
    x[..., :half] = 1
    turned = rope(x, positions)[:, 0]
    assert not turned[..., rope.dims :].any()
    return turned[..., :half], turned[..., half : rope.dims]


@EVERY
def test_frequencies_and_factor_have_transformers_bits(case):
    rope, config = ours(case), theirs(case)
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        dims = int(config.head_dim * CASES[case][3])
        frequency = 1.0 / (CASES[case][1] ** (torch.arange(0, dims, 2).float() / dims))
        factor = 1.0
    else:
        frequency, factor = ROPE_INIT_FUNCTIONS[kind](config)
    assert torch.equal(rope.inverse_frequency, frequency)
    assert rope.attention_factor == factor
    assert isinstance(rope.attention_factor, float)
    if kind == "longrope":
        limit = config.rope_parameters["original_max_position_embeddings"]
        frequency, _ = ROPE_INIT_FUNCTIONS[kind](config, seq_len=limit + 1)
        assert torch.equal(rope.long_inverse_frequency, frequency)
        assert not torch.equal(rope.long_inverse_frequency, rope.inverse_frequency)


# up to a limit and one past it (2048 dynamic, 4096 longrope), and far out
LASTS = [0, 2047, 2048, 4095, 4096, 5000, 99_999]


@EVERY
@pytest.mark.parametrize("last", LASTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_have_transformers_bits(case, last, dtype):
    positions = torch.tensor([[0, 1, last // 3, last], [0, 0, 1, last // 2]])
    x = torch.zeros(1, dtype=dtype)
    cos, sin = Glm4MoeRotaryEmbedding(theirs(case))(x, positions)
    half = cos.shape[-1] // 2
    got_cos, got_sin = tables(ours(case), positions, dtype)
    assert torch.equal(got_cos, cos[..., :half])
    assert torch.equal(got_sin, sin[..., :half])


FAMILIES = {  # model type: (scaling, fraction, interleaved, in_fp32, same layout and bits)
    "llama": (LLAMA3, 1.0, False, False, True),
    "qwen3_moe": (None, 1.0, False, False, True),
    "deepseek_v3": (CASES["deepseek-v2"][2], 1.0, True, False, False),
    "ernie4_5_moe": (None, 1.0, True, True, True),
    "glm4_moe": (None, 0.5, False, False, True),
    "gpt_oss": (GPT_OSS, 1.0, False, False, True),
    "hunyuan_v1_moe": ({**DYNAMIC, **INERT, "factor": 1.0, "alpha": 1000.0}, 1.0, False, False,
                       True),
    "llama4_text": (SCOUT, 1.0, True, True, False),
}  # fmt: skip


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_products_of_the_families(family, dtype):
    scaling, fraction, interleaved, in_fp32, same = FAMILIES[family]
    parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": 5e5}
    if fraction != 1:
        parameters["partial_rotary_factor"] = fraction
    config = AutoConfig.for_model(
        family,
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=131072,
        rope_parameters=parameters,
        **({"qk_rope_head_dim": 64} if family == "deepseek_v3" else {"head_dim": 64}),
    )
    name = family.removesuffix("_text")
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    kinds = [k for k in vars(module) if k.endswith(("TextRotaryEmbedding", "RotaryEmbedding"))]
    (kind,) = [k for k in kinds if "Vision" not in k]
    rope = RotaryEmbedding(
        head_dim=64, base=5e5, scaling=scaling, fraction=fraction, interleaved=interleaved,
        in_fp32=in_fp32, max_seq_len=131072,
    )  # fmt: skip
    q, k = torch.randn(2, 3, 2, 5, 64).to(dtype)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 100, 4095, 4096, 100_000], [9, 8, 0, 1, 70_000]])
    cos_sin = getattr(module, kind)(config)(q, positions)
    if family == "llama4_text":
        turned = module.apply_rotary_emb(q.transpose(1, 2), k.transpose(1, 2), cos_sin)
        their_q, their_k = (t.transpose(1, 2) for t in turned)
    else:
        interleave = "_interleave" if family == "deepseek_v3" else ""
        apply = getattr(module, f"apply_rotary_pos_emb{interleave}")
        their_q, their_k = apply(q, k, *cos_sin)
    got_q, got_k = rope(q, positions), rope(k, positions)
    assert got_q.dtype == dtype
    if same:
        assert torch.equal(got_q, their_q)
        assert torch.equal(got_k, their_k)
    scores = got_q.double() @ got_k.double().mT
    wanted = their_q.double() @ their_k.double().mT
    limit = 1e-12 if dtype == torch.float64 and not in_fp32 else 1e-6
    assert_near(scores, wanted, limit if dtype != torch.bfloat16 else 2e-3)
    assert not torch.equal(got_q[1:], q[1:])


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_interleaved_is_a_permutation_of_halves(fraction):
    halves = RotaryEmbedding(head_dim=16, base=1e4, fraction=fraction)
    pairs = RotaryEmbedding(head_dim=16, base=1e4, fraction=fraction, interleaved=True)
    r = halves.dims
    x = torch.randn(2, 3, 4, 16)
    positions = torch.randint(0, 9000, (2, 4))
    order = torch.arange(r).view(2, -1).T.flatten()  # place 2i holds i, 2i + 1 holds i + r/2
    order = torch.cat((order, torch.arange(r, 16)))
    assert torch.equal(pairs(x[..., order], positions), halves(x, positions)[..., order])
    assert torch.equal(pairs(x, positions)[..., r:], x[..., r:])


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients(interleaved):
    rope = RotaryEmbedding(head_dim=8, base=100.0, scaling={**YARN4, "attention_factor": 1.3},
                           fraction=0.5, interleaved=interleaved, max_seq_len=8)  # fmt: skip
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rope(x, torch.tensor([[0, 3, 9]])), x)


@pytest.mark.parametrize("case", ["default", "half of glm-4.5", "gpt-oss", "llama 4 scout"])
def test_far_positions_are_turned_in_fp32(case):
    rope = ours(case).to(torch.bfloat16)
    positions = torch.tensor([[99_999, 100_000, 100_001]])
    cos, sin = tables(rope, positions, torch.float32)
    angles = positions[..., None].double() * rope.inverse_frequency.double()
    factor = rope.attention_factor
    # an fp32 angle of 1e5 is off by up to 0.004; in bf16 by up to 256
    assert (cos - angles.cos() * factor).abs().max() < 0.006
    assert (sin - angles.sin() * factor).abs().max() < 0.006
    assert_near(cos.square() + sin.square(), torch.full_like(cos, factor**2), 1e-6)


def test_in_fp32_differs_where_bf16_rounds():
    x = torch.randn(1, 2, 5, 64).to(torch.bfloat16)
    positions = torch.arange(5)[None] * 1000
    kwargs = {"head_dim": 64, "base": 1e4, "interleaved": True}
    exact = RotaryEmbedding(**kwargs)(x.double(), positions)
    coarse, fine = (
        (RotaryEmbedding(**kwargs, in_fp32=on)(x, positions) - exact).abs().sum()
        for on in (False, True)
    )
    assert fine < 0.8 * coarse


@pytest.mark.parametrize(("case", "limit"), [("dynamic", 2048), ("longrope", 4096)])
def test_the_length_is_the_forwards_own(case, limit):
    rope = ours(case)
    kept = {name: buffer.clone() for name, buffer in rope.named_buffers()}

    def at(*positions):
        cos, _ = tables(rope, torch.tensor(positions), torch.float32)
        return cos[0, 1]

    alone = at([0, 500])
    assert torch.equal(at([0, 500, limit - 1]), alone)
    longer = at([0, 500, limit])
    assert not torch.equal(longer, alone)
    assert torch.equal(at([0, 500, 1], [0, 1, limit]), longer), "the longest row decides for all"
    assert torch.equal(at([0, 500]), alone), "nothing is remembered"
    # two documents in a row of twice the limit: their own positions count, not the row's length
    packed = torch.arange(limit).repeat(2)[None]
    cos, _ = tables(rope, packed, torch.float32)
    assert torch.equal(cos[0, 500], alone)
    assert all(torch.equal(buffer, kept[name]) for name, buffer in rope.named_buffers())


def test_alpha_does_not_depend_on_the_length():
    scaling = {**DYNAMIC, "alpha": 1000.0}
    rope = RotaryEmbedding(head_dim=64, base=1e4, scaling=scaling)
    stretched = RotaryEmbedding(head_dim=64, base=1e4 * 1000 ** (64 / 62))
    assert torch.equal(rope.inverse_frequency, stretched.inverse_frequency)
    x, positions = torch.randn(1, 1, 2, 64), torch.tensor([[3, 10**6]])
    assert torch.equal(rope(x, positions), stretched(x, positions))
    absent = RotaryEmbedding(head_dim=64, base=1e4, scaling={**DYNAMIC, "alpha": None},
                             max_seq_len=64)  # fmt: skip
    assert torch.equal(absent.inverse_frequency, ours("default by name").inverse_frequency[::2])


@EVERY
def test_meta_device_then_memory(case):
    with torch.device("meta"):
        rope = ours(case)
        turned = rope(torch.empty(2, 3, 4, rope.head_dim), torch.empty(1, 4, dtype=torch.int64))
    assert turned.is_meta, "decided on the device: a value read from it would have raised"
    rope = rope.to_empty(device="cpu")
    for buffer in rope.buffers():
        buffer.fill_(float("nan"))
    rope.rope_init()
    for name, buffer in ours(case).named_buffers():
        assert torch.equal(rope.get_buffer(name), buffer)
        assert rope.get_buffer(name).dtype == torch.float32
    assert not rope.state_dict()
    for name, buffer in rope.to(torch.bfloat16).named_buffers():
        assert torch.equal(buffer, ours(case).get_buffer(name))


@pytest.mark.parametrize("case", ["default", "gpt-oss", "dynamic, half", "longrope", "dynamic"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_compiles_into_one_graph(case, interleaved):
    rope = ours(case, interleaved=interleaved, in_fp32=interleaved)
    torch.compiler.reset()
    compiled = torch.compile(rope, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 2, 3, rope.head_dim)
    for last in (5, 9000):
        positions = torch.tensor([[0, 4, last]])
        assert torch.equal(compiled(x, positions), rope(x, positions))


def test_llama3_without_waves_between_is_finite():
    """Where a wave is as long as the limit to the bit, the share between would be 0/0."""
    scaling = {**SCOUT, "original_max_position_embeddings": 2 * math.pi}
    rope = RotaryEmbedding(head_dim=8, base=1e4, scaling=scaling)
    assert rope.inverse_frequency[0] == 1
    assert rope.inverse_frequency[1:].tolist() == pytest.approx([0.1 / 16, 0.01 / 16, 0.001 / 16])


@pytest.mark.parametrize("scale", [0.5, 1, 1.0, 4, 32, 40])
@pytest.mark.parametrize("mscale", [0.707, 1.0])
def test_yarn_mscale(scale, mscale):
    assert yarn_mscale(scale, mscale) == yarn_get_mscale(scale, mscale)
    assert yarn_mscale(40, 1) == pytest.approx(0.1 * math.log(40) + 1)


def test_each_type_knows_its_keys():
    assert set(SCALING_KEYS) == {"default", "linear", "dynamic", "yarn", "llama3", "longrope"}
    for needed, optional in SCALING_KEYS.values():
        assert not needed & optional
        assert "rope_type" not in needed | optional
    used = {key for _, _, scaling, _, _ in CASES.values() for key in scaling or ()}
    known = {key for sets in SCALING_KEYS.values() for keys in sets for key in keys}
    assert known - used == {"alpha"}, "the tables above cover every key"


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        ({"rope_type": "su"}, "rope_type is 'su', but must be one of default, linear, dynamic,"),
        ({"rope_type": ["yarn"]}, r"rope_type is \['yarn'\], but must be one of"),
        ({"factor": 2.0}, "type default has factor, but knows only rope_type: leave it out"),
        ({"rope_type": "linear"}, "type linear lacks factor: add it"),
        ({"rope_type": "linear", "factor": None}, "type linear has no value for factor: add it"),
        ({"rope_type": "linear", "factor": 0.5}, "factor is 0.5, but must be a number of at least"),
        ({"rope_type": "linear", "factor": "2"}, "factor is '2', but must be a number"),
        ({"rope_type": "linear", "factor": True}, "factor is True, but must be a number"),
        ({"rope_type": "linear", "factor": math.nan}, "factor is nan, but must be a number"),
        ({"rope_type": "linear", "factor": 2, "alpha": 3}, "has alpha, but knows only factor"),
        ({**DYNAMIC, "attention_factor": 1.0}, "type dynamic has attention_factor, but knows"),
        ({**DYNAMIC, "alpha": 0.5}, "alpha is 0.5, but must be a number of at least 1"),
        (DYNAMIC, "type dynamic without alpha needs max_seq_len"),
        (YARN4, "type yarn without original_max_position_embeddings needs max_seq_len"),
        ({**YARN40, "factor": None}, "type yarn without factor needs max_seq_len"),
        ({**YARN40, "rope_theta": 1e4}, "type yarn has rope_theta, but knows only"),
        ({**YARN40, "truncate": None}, "truncate is None, but must be true or false"),
        ({**YARN40, "truncate": 1}, "truncate is 1, but must be true or false"),
        ({**YARN40, "beta_fast": 0}, "beta_fast is 0, but must be a number above 0"),
        ({**YARN40, "beta_slow": 33}, r"beta_fast is 32, but must not be below beta_slow \(33\)"),
        ({**YARN40, "attention_factor": 0.0}, "attention_factor is 0.0, but must be .* above 0"),
        ({**YARN40, "mscale": -1}, "mscale is -1, but must be a number of at least 0"),
        ({**YARN40, "original_max_position_embeddings": 1}, "is 1, but must be .* of at least 2"),
        (without(LLAMA3, "low_freq_factor"), "type llama3 lacks low_freq_factor: add it"),
        ({**LLAMA3, "low_freq_factor": None}, "type llama3 has no value for low_freq_factor"),
        ({**LLAMA3, "low_freq_factor": 5}, r"high_freq_factor is 4.0, but .* low_freq_factor \(5"),
        (without(LLAMA3, "original_max_position_embeddings"), "type llama3 without original_max"),
        (LONGROPE, "longrope without factor and attention_factor needs max_seq_len"),
        (without(LONGROPE, "short_factor", "long_factor"), "lacks long_factor, short_factor"),
        ({**LONGROPE, "factor": 8, "short_factor": [1.0] * 23},
         "short_factor is 23 values, but must be a list of 24 numbers above 0, .* 48 rotary dims"),
        ({**LONGROPE, "factor": 8, "long_factor": [0.0] * 24}, "long_factor is 24 values, but"),
        ({**LONGROPE, "factor": 8, "long_factor": 2.0}, "long_factor is 2.0, but must be a list"),
        ({**LONGROPE, "factor": 8, "long_factor": None}, "long_factor is None, but must be a list"),
        ({**LONGROPE, "short_mscale": 1.2}, "type longrope has short_mscale, but knows only"),
    ],
)  # fmt: skip
def test_refused_scalings(scaling, said):
    with pytest.raises(InputError, match=said) as refused:
        RotaryEmbedding(head_dim=48, base=1e4, scaling=scaling)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"head_dim": 5}, "head_dim is 5, but rotary embedding needs an even number"),
        ({"head_dim": 0}, "head_dim is 0, but rotary"),
        ({"head_dim": 12, "fraction": 0.25}, r"is 12 and 3 of it \(fraction 0.25\) are turned"),
        ({"fraction": 0.0}, "fraction of a head is 0.0, but must be above 0 and at most 1"),
        ({"fraction": 1.5}, "fraction of a head is 1.5, but"),
        ({"fraction": "0.5"}, "fraction of a head is '0.5', but"),
        ({"base": 1.0}, "rotary base is 1.0, but must be above 1"),
        ({"base": None}, "rotary base is None, but must be above 1"),
        ({"max_seq_len": 0}, "max_seq_len is 0, but must be at least 1"),
        ({"head_dim": 2, "scaling": DYNAMIC, "max_seq_len": 8}, "at least 4 rotary dims, not 2"),
        ({"scaling": {**YARN40, "factor": None}, "max_seq_len": 2048},
         "factor is 0.5, but must be a number of at least 1"),
    ],
)  # fmt: skip
def test_refused(kwargs, said):
    with pytest.raises(InputError, match=said):
        RotaryEmbedding(**{"head_dim": 8, "base": 1e4, **kwargs})


def test_the_callers_mapping_is_left_alone():
    scaling = dict(YARN4)
    RotaryEmbedding(head_dim=8, base=1e4, scaling=scaling, max_seq_len=64)
    assert scaling == YARN4
