"""The layer that stands in a transformer's ``mlp`` slot: router, experts, shared experts.

Letters: b batch · s sequence · t = b·s tokens · d dim · a assignments · e num_experts.
"""

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from moe_builders.dispatch import Assigned, Dispatcher, dispatch_locally
from moe_builders.errors import InputError
from moe_builders.experts.builders import latent_projection, moe_experts, shared_experts
from moe_builders.ops.activations import Activation
from moe_builders.routers.capacity import Capacity
from moe_builders.routers.gate import JitterKind, check_gate, real_rows
from moe_builders.routers.scores import ScoreFunction, WeightsFrom
from moe_builders.routers.token_choice import TokenChoiceTopKRouter
from moe_builders.routing import Router, Routing, TokenInfo

ScorePosition = Literal["before", "mid", "after"]


class MoE(nn.Module):
    """Mixture of experts: y = Σ over a token's experts of weight · expert(x), + shared(x).

    Args:
        router: any ``Router``; a module if it has parameters.
        experts: ``GroupedExperts`` or anything with its forward.
        shared_experts: a module [.., d] -> [.., d] applied to every token, masked ones too.
        shared_gate: a module [.., d] -> [.., 1]; its sigmoid multiplies the shared answer.
        score_position: where the weight multiplies: "after" the experts (nearly all models),
            "mid" (between activation and down projection; same answer, one rounding apart) or
            "before" (their input, as in Llama 4: a different model).
        capacity: how many tokens an expert takes at most; None: all that come (dropless).
        latent_down, latent_up: modules [t, d] -> [t, n] and back, so that the routed experts work
            in n dims; router and shared experts see d (Nemotron 3).
        dispatcher: how tokens reach the experts; ``parallel.expert_parallel`` has those for experts
            on several processes.

    Raises:
        InputError: unknown score_position, a shared_gate without shared_experts, one half of a
            latent space, a capacity that is none, or a router for another number of experts.
    """

    def __init__(
        self,
        *,
        router: Router,
        experts: nn.Module,
        shared_experts: nn.Module | None = None,
        shared_gate: nn.Module | None = None,
        score_position: ScorePosition = "after",
        capacity: Capacity | None = None,
        latent_down: nn.Module | None = None,
        latent_up: nn.Module | None = None,
        dispatcher: Dispatcher = dispatch_locally,
    ) -> None:
        super().__init__()
        if score_position not in get_args(ScorePosition):
            raise InputError(
                f"score_position {score_position!r} is not one of "
                f"{', '.join(get_args(ScorePosition))}"
            )
        if shared_gate is not None and shared_experts is None:
            raise InputError("shared_gate is given, but there are no shared_experts to gate")
        if capacity is not None and not isinstance(capacity, Capacity):
            raise InputError(
                f"capacity is {capacity!r}, but must be a Capacity: in a config {{_component_: "
                "moe_builders.routers.capacity.Capacity, factor: 1.25}"
            )
        if (latent_down is None) != (latent_up is None):
            raise InputError("latent_down and latent_up go together: give both or none")
        served, there = getattr(router, "num_experts", None), getattr(experts, "num_experts", None)
        if served is None:
            raise InputError(f"the router {type(router).__name__} lacks an attribute num_experts")
        if there is not None and served != there:
            raise InputError(
                f"the router serves {served} experts, but there are {there}: give both the same"
            )
        self.router = router
        self.experts = experts
        self.shared_experts = shared_experts
        self.shared_gate = shared_gate
        self.score_position = score_position
        self.capacity = capacity
        self.latent_down, self.latent_up = latent_down, latent_up
        self.dispatcher = dispatcher
        self.last_routing: Routing | None = None  # overwritten by every forward, never summed

    def __getstate__(self) -> dict[str, Any]:
        # a copy has routed nothing yet; the last routing's graph could not be copied
        return self.__dict__ | {"last_routing": None}

    def forward(self, x: Tensor, info: TokenInfo | None = None) -> Tensor:
        """Apply the layer.

        Args:
            x: [b, s, d] or [t, d].
            info: what is known of the t tokens; None: all real.

        Returns:
            Same shape and dtype as x; a masked token's routed part is exactly zero.
        """
        tokens = x.reshape(-1, x.shape[-1])  # [t, d]
        routing = self.router(tokens, info if info is not None else TokenInfo())
        if self.capacity is not None:
            routing = self.capacity.limit(routing, training=self.training)
        self.last_routing = routing
        out = self._routed(tokens, routing)  # [t, d]
        if self.shared_experts is not None:
            shared = self.shared_experts(tokens)
            if self.shared_gate is not None:
                shared = self.shared_gate(tokens).sigmoid() * shared
            out = out + shared
        return out.view_as(x)

    def _routed(self, tokens: Tensor, routing: Routing) -> Tensor:
        mask = routing.info.mask
        if self.latent_down is not None:
            # a masked token may hold NaN, which a product would spread
            tokens = self.latent_down(real_rows(tokens, mask))
        out = self.dispatcher(tokens, self._assigned(routing), self.experts)
        if self.latent_up is None:
            return out
        out = self.latent_up(out)
        return out if mask is None else torch.where(mask[:, None], out, 0)  # a bias has no mask

    def _assigned(self, routing: Routing) -> Assigned:
        given, weights = routing.input_weights, routing.weights
        before = mid = after = None
        if self.score_position == "before":
            before = weights
            if routing.slot_of is None and given is not None:
                # a row in excess (``Capacity.pad``) is 0, but an expert with biases answers
                after = (given != 0).to(weights.dtype)
        elif self.score_position == "mid":
            mid = weights
        else:
            after = weights
        if given is not None:
            before = given if before is None else given * before
        return Assigned(
            routing.token_index, routing.num_tokens_per_expert, routing.slot_of,
            input_weights=before, row_weights=mid, output_weights=after,
        )  # fmt: skip


def moe_layers(model: nn.Module) -> Iterator[tuple[str, MoE]]:
    """(module name, layer) of every MoE, in layer order."""
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            yield name, module


def collect_routing(model: nn.Module) -> dict[str, Routing]:
    """The routing of each MoE layer's last forward, by module name, in layer order.

    Raises:
        InputError: a layer has not run yet.
    """
    found = {}
    for name, layer in moe_layers(model):
        if layer.last_routing is None:
            raise InputError(f"{name} has not routed anything yet: run a forward first")
        found[name] = layer.last_routing
    return found


def moe_layer_names(model: nn.Module) -> list[str]:
    """What ``collect_routing`` calls each layer, without the mlp slot's name: "layers.3"."""
    return [name.removesuffix(".mlp") for name, _ in moe_layers(model)]


def moe_layer(
    *,
    embed_dim: int,
    expert_hidden_dim: int,
    num_experts: int,
    experts_per_token: int = 1,
    shared_hidden_dim: int | None = None,
    shared_gate: bool = False,
    shared_bias: bool = False,
    shared_activation: str | Activation = "swiglu",
    activation: str | Activation = "swiglu",
    expert_proj_bias: bool = False,
    expert_dropout: float = 0.0,
    hidden_scale: bool = False,
    latent_dim: int | None = None,
    latent_bias: bool = False,
    score_function: ScoreFunction = "softmax",
    normalize_weights: bool = True,
    normalize_eps: float = 1e-20,
    normalize_min: float = 0.0,
    route_scale: float = 1.0,
    expert_bias: bool = False,
    gate_bias: bool = False,
    num_groups: int = 1,
    groups_per_token: int = 1,
    group_score_topk: int | Literal["auto"] = 2,
    weights_from: WeightsFrom = "scores",
    gate_precision: str | None = None,
    jitter: JitterKind | None = None,
    jitter_scale: float = 0.0,
    score_position: ScorePosition = "after",
    capacity: Capacity | None = None,
    router: Router | None = None,
) -> MoE:
    """A MoE layer from plain numbers.

    Args:
        embed_dim: d.
        expert_hidden_dim: h of one routed expert.
        num_experts: e.
        experts_per_token: k.
        shared_hidden_dim: width of the shared experts together; None: none.
        shared_gate: gate the shared experts with a sigmoid (Qwen2-MoE).
        shared_bias: the shared experts' projections have biases (ERNIE 4.5).
        shared_activation: of the shared experts.
        activation: of the routed experts.
        expert_proj_bias: the routed experts' projections have biases.
        expert_dropout, hidden_scale: ``dropout`` and ``hidden_scale`` of ``GroupedExperts``.
        latent_dim: the routed experts work in this many dims, between two projections; router and
            shared experts see d. None: they work in d.
        latent_bias: these two projections have biases.
        score_function, normalize_weights, normalize_eps, normalize_min, route_scale, expert_bias,
            gate_bias, num_groups, groups_per_token, group_score_topk, weights_from,
            gate_precision, jitter, jitter_scale: of ``TokenChoiceTopKRouter``.
        score_position, capacity: of ``MoE``.
        router: a router of one's own instead of the token-choice one; the arguments that would
            have described that one are then unused.
    """
    if router is None:
        router = TokenChoiceTopKRouter(
            dim=embed_dim,
            num_experts=num_experts,
            experts_per_token=experts_per_token,
            score_function=score_function,
            normalize_weights=normalize_weights,
            normalize_eps=normalize_eps,
            normalize_min=normalize_min,
            route_scale=route_scale,
            expert_bias=expert_bias,
            gate_bias=gate_bias,
            num_groups=num_groups,
            groups_per_token=groups_per_token,
            group_score_topk=group_score_topk,
            weights_from=weights_from,
            gate_precision=gate_precision,
            jitter=jitter,
            jitter_scale=jitter_scale,
        )
    elif router.num_experts != num_experts:
        raise InputError(
            f"the router serves {router.num_experts} experts, but num_experts is {num_experts}"
        )
    else:
        check_gate(router, embed_dim)
    shared = None
    if shared_hidden_dim is not None:
        shared = shared_experts(
            embed_dim=embed_dim,
            shared_hidden_dim=shared_hidden_dim,
            bias=shared_bias,
            activation=shared_activation,
        )
    latent_down = latent_up = None
    if latent_dim is not None:
        if latent_dim < 1:
            raise InputError(f"latent_dim is {latent_dim}, but must be at least 1, or null")
        latent_down = latent_projection(embed_dim, latent_dim, bias=latent_bias)
        latent_up = latent_projection(latent_dim, embed_dim, bias=latent_bias)
    elif latent_bias:
        raise InputError("latent_bias is true, but there is no latent_dim: give one, or leave both")
    return MoE(
        router=router,
        experts=moe_experts(
            embed_dim=embed_dim if latent_dim is None else latent_dim,
            expert_hidden_dim=expert_hidden_dim,
            num_experts=num_experts,
            activation=activation,
            bias=expert_proj_bias,
            hidden_scale=hidden_scale,
            dropout=expert_dropout,
        ),
        shared_experts=shared,
        shared_gate=nn.Linear(embed_dim, 1, bias=False) if shared_gate else None,
        score_position=score_position,
        capacity=capacity,
        latent_down=latent_down,
        latent_up=latent_up,
    )
