"""A router of one's own, trained by the recipe without an edit in the package.

cd examples && tune run moe_full_finetune --config custom_router.yaml
"""

import torch
from torch import Tensor, nn

from moe_builders.routing import Routing, TokenInfo, route_by_choice


class CosineRouter(nn.Module):
    """Each token takes the k experts whose embedding points most nearly where it does.

    Source: Chi et al. 2022 (2204.09179), without the projection.
    """

    causal = True

    def __init__(self, *, dim: int, num_experts: int, experts_per_token: int) -> None:
        super().__init__()
        self.num_experts, self.experts_per_token = num_experts, experts_per_token
        self.embedding = nn.Parameter(torch.randn(num_experts, dim))  # [e, d]

    def forward(self, x: Tensor, info: TokenInfo) -> Routing:
        """[t, d] -> which experts, by cosine; temperature 0.1."""
        towards = nn.functional.normalize(self.embedding.float(), dim=-1)
        logits = nn.functional.normalize(x.float(), dim=-1) @ towards.t() / 0.1  # [t, e]
        probs = logits.softmax(-1)
        weights, expert = probs.topk(self.experts_per_token, dim=-1)  # [t, k]
        return route_by_choice(
            expert=expert, weights=weights, logits=logits, probs=probs, info=info
        )
