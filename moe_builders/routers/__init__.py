"""One file a routing idea; all of them answer with a Routing."""

from moe_builders.routers.coordinate_descent import CoordinateDescentRouter
from moe_builders.routers.expert_choice import ExpertChoiceTopKRouter
from moe_builders.routers.forced_balance import ForcedBalanceRouter
from moe_builders.routers.hash import HashRouter
from moe_builders.routers.sinkhorn import SinkhornRouter
from moe_builders.routers.threshold import ThresholdRouter
from moe_builders.routers.token_choice import TokenChoiceTopKRouter

__all__ = [
    "CoordinateDescentRouter",
    "ExpertChoiceTopKRouter",
    "ForcedBalanceRouter",
    "HashRouter",
    "SinkhornRouter",
    "ThresholdRouter",
    "TokenChoiceTopKRouter",
]
