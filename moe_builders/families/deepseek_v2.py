"""DeepSeek-V2 and V2-Lite: facts, builders, config reader, weight rows.

Source: transformers ``models/deepseek_v2`` (5.23); field names of config.json in brackets below.
Softmax over all experts, top-k of all or of the groups with the best single expert [topk_method],
weights not renormalised but scaled [routed_scaling_factor]; SwiGLU experts without biases beside
ungated shared experts, the first layers dense [first_k_dense_replace]; multi-head latent attention,
queries of a latent of their own or not [q_lora_rank], rotary layout interleaved, turned in fp32;
YaRN's mscale² is in the scale of the scores; all norms pre-norm.

[norm_topk_prob] true is refused: transformers reads past it, the releases' own code does not.
"""

from collections.abc import Mapping
from typing import Any

from moe_builders import hf_rows
from moe_builders.config_reader import ConfigReader
from moe_builders.decoder import MoEDecoder
from moe_builders.family import Family
from moe_builders.latent_decoder import latent_moe_decoder

MODEL_TYPE = "deepseek_v2"

WEIGHT_MAP = (
    *hf_rows.EMBEDDINGS,
    *hf_rows.PRE_NORMS,
    *hf_rows.LATENT_ATTENTION,
    *hf_rows.ROUTER,
    *hf_rows.EXPERTS,
    *hf_rows.SHARED_EXPERTS,
    *hf_rows.DENSE_MLP,
)


def deepseek_v2_lite() -> MoEDecoder:
    """DeepSeek-V2-Lite: 15,706,484,224 parameters, 2.66 B active. Source: its config.json."""
    return latent_moe_decoder(
        vocab_size=102400,
        embed_dim=2048,
        num_layers=27,
        num_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        num_experts=64,
        experts_per_token=6,
        expert_hidden_dim=1408,
        shared_hidden_dim=2816,
        intermediate_dim=10944,
        max_seq_len=163840,
        rope_scaling=_YARN,
        **_KIND,
    )


def deepseek_v2_236b() -> MoEDecoder:
    """DeepSeek-V2: 235,741,434,880 parameters, 21.38 B active. Source: its config.json."""
    return latent_moe_decoder(
        vocab_size=102400,
        embed_dim=5120,
        num_layers=60,
        num_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        num_experts=160,
        experts_per_token=6,
        expert_hidden_dim=1536,
        shared_hidden_dim=3072,
        intermediate_dim=12288,
        max_seq_len=163840,
        num_groups=8,
        groups_per_token=3,
        route_scale=16.0,
        rope_scaling=_YARN,
        **_KIND,
    )


_KIND: Mapping[str, Any] = {
    "score_function": "softmax", "expert_bias": False, "normalize_weights": False,
    "group_score_topk": 1, "rope_in_fp32": True,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
    "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
}  # fmt: skip


def builder_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of this model type -> arguments of ``latent_moe_decoder``.

    Raises:
        InputError: fields this family does not honour, or needed ones that are missing; all of
            them are named.
    """
    read = ConfigReader(config, MODEL_TYPE)
    heads, expert_dim = read.whole("num_attention_heads"), read.whole("moe_intermediate_size")
    plain, turned = read.whole("qk_nope_head_dim"), read.whole("qk_rope_head_dim")
    groups = {}
    if config.get("topk_method") == "group_limited_greedy":
        groups = {
            "num_groups": read.whole("n_group"),
            "groups_per_token": read.whole("topk_group"),
        }
    else:  # greedy looks at no groups
        for name in ("n_group", "topk_group"):
            if read.whole(name, default=1) != 1:
                read.refuse(name, "only 1 where topk_method is 'greedy'")
    arguments = {
        "vocab_size": read.whole("vocab_size"),
        "embed_dim": read.whole("hidden_size"),
        "num_layers": read.whole("num_hidden_layers"),
        "num_heads": heads,
        "q_lora_rank": read.whole("q_lora_rank", default=1536, null=None),
        "kv_lora_rank": read.whole("kv_lora_rank"),
        "qk_nope_head_dim": plain,
        "qk_rope_head_dim": turned,
        "v_head_dim": read.whole("v_head_dim"),
        "num_experts": read.whole("n_routed_experts", "num_experts"),
        "experts_per_token": read.top_k("num_experts_per_tok", normalised=False),
        "expert_hidden_dim": expert_dim,
        "shared_hidden_dim": expert_dim * read.whole("n_shared_experts"),
        "intermediate_dim": read.whole("intermediate_size"),
        "max_seq_len": read.whole("max_position_embeddings"),
        "dense_layers": range(read.whole("first_k_dense_replace", default=0, least=0)),
        **groups,
        **_KIND,
        "route_scale": read.number("routed_scaling_factor", default=1.0),
        **read.rope(),
        "norm_eps": read.number("rms_norm_eps", default=1e-6),
        "attention_bias": read.flag("attention_bias", default=False),
        "tie_word_embeddings": read.flag("tie_word_embeddings", default=False),
    }
    read.only("topk_method", "greedy", "group_limited_greedy")
    read.only("num_key_value_heads", heads, None)
    read.only("head_dim", turned, None)
    read.only("qk_head_dim", plain + turned)
    read.only("norm_topk_prob", False, None)
    read.only("scoring_func", "softmax")
    read.only("moe_layer_freq", 1)
    read.only("hidden_act", "silu")
    read.only("mlp_bias", False)
    read.only("attention_dropout", 0)
    read.ignore("aux_loss_alpha", "seq_aux", "ep_size")  # of a loss and of other programs
    read.finish()
    return arguments


FAMILY = Family(MODEL_TYPE, WEIGHT_MAP, builder_arguments, latent_moe_decoder)
