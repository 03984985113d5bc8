"""One file a family; this table is all there is to find them by a config.json's ``model_type``."""

from moe_builders.families import qwen3_moe

BY_MODEL_TYPE = {
    qwen3_moe.MODEL_TYPE: qwen3_moe,
}
