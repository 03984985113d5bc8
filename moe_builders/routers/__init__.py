"""One file a routing idea; all of them answer with a Routing."""

from moe_builders.routers.expert_choice import ExpertChoiceTopKRouter
from moe_builders.routers.token_choice import TokenChoiceTopKRouter

__all__ = ["ExpertChoiceTopKRouter", "TokenChoiceTopKRouter"]
