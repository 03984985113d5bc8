"""Full fine-tuning of mixture-of-experts language models, torchtune style.

The parts a model of one's own is composed of; see ARCHITECTURE.md for where everything stands.
"""

from moe_builders.parallel.launch import first_process_warns

with first_process_warns():  # torchao logs a line when torchtune imports it
    from moe_builders.blocks import SparseMoEBlock, sparse_moe_block
    from moe_builders.decoder import MoEDecoder, moe_decoder
    from moe_builders.errors import InputError
    from moe_builders.experts import ExpertList, GroupedExperts, moe_experts, shared_experts
    from moe_builders.generic import moe_transformer
    from moe_builders.hub import HFSource, load_hf_model, save_hf_model
    from moe_builders.losses import load_balancing_loss, router_z_loss
    from moe_builders.moe import MoE, collect_routing, moe_layer
    from moe_builders.routers import (
        CoordinateDescentRouter,
        ExpertChoiceTopKRouter,
        ForcedBalanceRouter,
        HashRouter,
        SinkhornRouter,
        ThresholdRouter,
        TokenChoiceTopKRouter,
    )
    from moe_builders.routers.capacity import Capacity
    from moe_builders.routers.replay import RouterReplay
    from moe_builders.routing import Router, Routing, TokenInfo, check_routing, route_by_choice

__all__ = [
    "Capacity",
    "CoordinateDescentRouter",
    "ExpertChoiceTopKRouter",
    "ExpertList",
    "ForcedBalanceRouter",
    "GroupedExperts",
    "HFSource",
    "HashRouter",
    "InputError",
    "MoE",
    "MoEDecoder",
    "Router",
    "RouterReplay",
    "Routing",
    "SinkhornRouter",
    "SparseMoEBlock",
    "ThresholdRouter",
    "TokenChoiceTopKRouter",
    "TokenInfo",
    "check_routing",
    "collect_routing",
    "load_balancing_loss",
    "load_hf_model",
    "moe_decoder",
    "moe_experts",
    "moe_layer",
    "moe_transformer",
    "route_by_choice",
    "router_z_loss",
    "save_hf_model",
    "shared_experts",
    "sparse_moe_block",
]
