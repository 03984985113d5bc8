"""FlexOlmo: norms behind attention and experts, q/k norms over all heads together."""

from helpers_parity import EVERYWHERE, Case, on_layers
from torch import nn


class _NormOfEachHead(nn.Module):
    """The same weights with a mean of squares for each head instead of one for all."""

    def __init__(self, norm, head_dim) -> None:
        super().__init__()
        self.norm, self.head_dim = norm, head_dim

    def forward(self, x):
        heads = x.unflatten(-1, (-1, self.head_dim))
        scale = (heads.square().mean(-1, keepdim=True) + self.norm.eps).rsqrt()
        return (heads * scale).flatten(-2) * self.norm.weight


def _norms_of_heads(layer) -> None:
    attention = layer.attn
    attention.q_norm = _NormOfEachHead(attention.q_norm, attention.head_dim)
    attention.k_norm = _NormOfEachHead(attention.k_norm, attention.head_dim)


def _norms_swapped(layer) -> None:
    layer.sa_scale, layer.mlp_scale = layer.mlp_scale, layer.sa_scale


def _norms_before(layer) -> None:
    layer.sa_norm, layer.sa_scale = layer.sa_scale, nn.Identity()
    layer.mlp_norm, layer.mlp_scale = layer.mlp_scale, nn.Identity()


def _calmer(model) -> None:
    """Nothing is normalised before attention and routers: they see a sum of unit branches.

    With branches as wide all of a token's probability is on one expert, and the margins between
    the next ones are below any rounding. With embeddings as small as elsewhere biases make all
    queries and keys of the first layer alike: gradients in fp32 are then 1e-5 from those in fp64,
    transformers' as ours. (Where the output is the embedding, logits would grow with it.)
    """
    if not model.config.tie_word_embeddings:
        model.model.embed_tokens.weight.data.mul_(10)
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight.data.mul_(0.3)
        layer.post_feedforward_layernorm.weight.data.mul_(0.3)


CASE = Case(
    model_type="flex_olmo",
    hf_model="FlexOlmoForCausalLM",
    hf_config="FlexOlmoConfig",
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
        # head_dim is not hidden / heads; an eps large enough to be seen
        "gqa": {"num_key_value_heads": 2, "head_dim": 24, "rms_norm_eps": 1e-2},
        "tied": {"tie_word_embeddings": True},
        "bias": {"attention_bias": True, "num_key_value_heads": 1},
        "normalised": {"norm_topk_prob": True},
        "all_experts": {"num_experts": 5, "num_experts_per_tok": 5},
        "yarn": {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    },
    mutations={
        **{name: ("gqa", mutate) for name, mutate in EVERYWHERE.items()},
        "norms swapped": ("gqa", on_layers(_norms_swapped)),
        "norms before": ("gqa", on_layers(_norms_before)),
        "no q_norm": ("gqa", on_layers(lambda layer: setattr(layer.attn, "q_norm", None))),
        "no k_norm": ("gqa", on_layers(lambda layer: setattr(layer.attn, "k_norm", None))),
        "norms of heads": ("gqa", on_layers(_norms_of_heads)),
    },
    prepare=_calmer,
    wide={
        "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 4, "intermediate_size": 128,
    },
)  # fmt: skip

RELEASES = []  # see the family: the released file's experts per token are not certain
