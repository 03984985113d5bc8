"""Full fine-tuning of mixture-of-experts language models, torchtune style.

The parts a model of one's own is composed of; see ARCHITECTURE.md for where everything stands.
"""

from moe_builders.parallel.launch import first_process_warns

with first_process_warns():  # torchao logs a line when torchtune imports it
    from moe_builders.decoder import MoEDecoder, moe_decoder
    from moe_builders.errors import InputError
    from moe_builders.experts import GroupedExperts
    from moe_builders.hub import HFSource, load_hf_model, save_hf_model
    from moe_builders.losses import load_balancing_loss, router_z_loss
    from moe_builders.moe import MoE, collect_routing, moe_experts, moe_layer, shared_experts
    from moe_builders.routers import ExpertChoiceTopKRouter, TokenChoiceTopKRouter
    from moe_builders.routing import Router, Routing, TokenInfo, check_routing

__all__ = [
    "ExpertChoiceTopKRouter",
    "GroupedExperts",
    "HFSource",
    "InputError",
    "MoE",
    "MoEDecoder",
    "Router",
    "Routing",
    "TokenChoiceTopKRouter",
    "TokenInfo",
    "check_routing",
    "collect_routing",
    "load_balancing_loss",
    "load_hf_model",
    "moe_decoder",
    "moe_experts",
    "moe_layer",
    "router_z_loss",
    "save_hf_model",
    "shared_experts",
]
