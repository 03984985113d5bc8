"""One file a family; this table is all there is to find them by a config.json's ``model_type``."""

from moe_builders.families import (
    deepseek_v2,
    deepseek_v3,
    dots1,
    ernie4_5_moe,
    flex_olmo,
    glm4_moe,
    glm4_moe_lite,
    gpt_oss,
    granitemoe,
    hunyuan_v1_moe,
    llama4,
    minimax_m2,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
)
from moe_builders.family import Family

_ALL = (
    deepseek_v2.FAMILY,
    deepseek_v3.FAMILY,
    deepseek_v3.KIMI_K2,
    dots1.FAMILY,
    ernie4_5_moe.FAMILY,
    flex_olmo.FAMILY,
    glm4_moe.FAMILY,
    glm4_moe_lite.FAMILY,
    gpt_oss.FAMILY,
    granitemoe.FAMILY,
    granitemoe.SHARED_FAMILY,
    hunyuan_v1_moe.FAMILY,
    hunyuan_v1_moe.HUB_FAMILY,
    llama4.FAMILY,
    llama4.MULTIMODAL,
    minimax_m2.FAMILY,
    mixtral.FAMILY,
    olmoe.FAMILY,
    qwen2_moe.FAMILY,
    qwen3_moe.FAMILY,
)
BY_MODEL_TYPE: dict[str, Family] = {family.model_type: family for family in _ALL}
