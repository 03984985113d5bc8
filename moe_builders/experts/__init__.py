"""Feed-forward networks of a layer: stacked, one by one, and from one form to the other."""

from moe_builders.experts.builders import moe_experts, shared_experts
from moe_builders.experts.expert_list import ExpertList, ExpertNetwork
from moe_builders.experts.grouped import GroupedExperts
from moe_builders.experts.layouts import from_layout, to_layout
from moe_builders.experts.stacking import merge_experts, split_experts

__all__ = [
    "ExpertList",
    "ExpertNetwork",
    "GroupedExperts",
    "from_layout",
    "merge_experts",
    "moe_experts",
    "shared_experts",
    "split_experts",
    "to_layout",
]
