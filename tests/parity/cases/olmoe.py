"""OLMoE: q/k norms over all heads together, clipping after them."""

from helpers_parity import EVERYWHERE, Case, on_layers
from torch import nn

from moe_builders.families import olmoe


class _NormOfEachHead(nn.Module):
    """The same weights with a mean of squares for each head instead of one for all."""

    def __init__(self, norm, head_dim) -> None:
        super().__init__()
        self.norm, self.head_dim = norm, head_dim

    def forward(self, x):
        heads = x.unflatten(-1, (-1, self.head_dim))
        scale = (heads.square().mean(-1, keepdim=True) + self.norm.eps).rsqrt()
        return (heads * scale).flatten(-2) * self.norm.weight


def norms_of_heads(layer) -> None:
    """One mean for each head, as other families have it."""
    attention = layer.attn
    attention.q_norm = _NormOfEachHead(attention.q_norm, attention.head_dim)
    attention.k_norm = _NormOfEachHead(attention.k_norm, attention.head_dim)


class _Clipped(nn.Module):
    def __init__(self, before, limit) -> None:
        super().__init__()
        self.before, self.limit = before, limit

    def forward(self, x):
        return self.before(x).clamp(-self.limit, self.limit)


def _clip_before_norms(layer) -> None:
    attention = layer.attn
    limit, attention.clip_qkv = attention.clip_qkv, None
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(attention, name, _Clipped(getattr(attention, name), limit))


CASE = Case(
    model_type="olmoe",
    hf_model="OlmoeForCausalLM",
    hf_config="OlmoeConfig",
    tiny={
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "intermediate_size": 32,
        "norm_topk_prob": False,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    },
    variants={
        "plain": {},
        # an eps large enough to be seen
        "gqa": {"num_key_value_heads": 2, "rms_norm_eps": 1e-2},
        "clipped": {"clip_qkv": 0.4, "num_key_value_heads": 1},
        "tied": {"tie_word_embeddings": True},
        "bias": {"attention_bias": True, "num_key_value_heads": 2},
        "normalised": {"norm_topk_prob": True},
        "linear": {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.5},
        },
    },
    mutations={
        **{name: ("gqa", mutate) for name, mutate in EVERYWHERE.items()},
        "no q_norm": ("gqa", on_layers(lambda layer: setattr(layer.attn, "q_norm", None))),
        "no k_norm": ("gqa", on_layers(lambda layer: setattr(layer.attn, "k_norm", None))),
        "norms of heads": ("gqa", on_layers(norms_of_heads)),
        "not clipped": ("clipped", on_layers(lambda layer: setattr(layer.attn, "clip_qkv", None))),
        "clipped before the norms": ("clipped", on_layers(_clip_before_norms)),
    },
    wide={
        "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 4, "intermediate_size": 128,
    },
)  # fmt: skip

RELEASES = [("OLMoE-1B-7B-0924", olmoe.olmoe_1b_7b, 6_919_161_856, "1.28")]
