"""What one layer with experts holds and costs, from plain numbers.

Letters: d dim · h hidden_dim of an expert · f width of a dense network · e num_experts ·
k experts_per_token · n width of a latent space.
"""

from dataclasses import dataclass

from moe_builders.errors import InputError


@dataclass(frozen=True)
class MoESize:
    """Router and routed experts of one layer in plain numbers; shared experts are not among them.

    Attributes:
        dim: d, which the gate sees.
        hidden_dim: h of one expert.
        num_experts: e.
        experts_per_token: k; the mean where experts pick tokens.
        gated: an expert has three matrices (gate, up, down), not two.
        bias: an expert's projections have biases.
        strategy: the router's idea, for ``name``.
        latent_dim: n, the width that experts in a latent space work in (the projections there and
            back are not counted here); None: d.

    Raises:
        InputError: a number is missing or below 1, or k is above e.
    """

    dim: int
    hidden_dim: int
    num_experts: int | None = None
    experts_per_token: float | None = None
    gated: bool = True
    bias: bool = False
    strategy: str = "top_k"
    latent_dim: int | None = None

    def __post_init__(self) -> None:
        for key in ("num_experts", "experts_per_token"):
            if getattr(self, key) is None:
                raise InputError(f"{key} is not set, so a layer's size is not known: give it")
        for key in ("dim", "hidden_dim", "num_experts", "latent_dim"):
            number = getattr(self, key)
            if number is not None and number < 1:
                raise InputError(f"{key} is {number}, but must be at least 1")
        if not 0 < self._k <= self._e:
            raise InputError(
                f"experts_per_token is {self._k:g}, but must be above 0 and at most num_experts "
                f"({self._e})"
            )

    @property
    def _width(self) -> int:
        return self.dim if self.latent_dim is None else self.latent_dim

    @property
    def _e(self) -> int:
        assert self.num_experts is not None
        return self.num_experts

    @property
    def _k(self) -> float:
        assert self.experts_per_token is not None
        return self.experts_per_token

    @property
    def name(self) -> str:
        """Such as ``MoE_8x2_d768_top_k``: e, k, h, strategy."""
        return f"MoE_{self._e}x{self._k:g}_d{self.hidden_dim}_{self.strategy}"

    @property
    def parameters_per_expert(self) -> int:
        """(3 or 2) · d · h, and the biases."""
        biases = (1 + self.gated) * self.hidden_dim + self._width if self.bias else 0
        return (2 + self.gated) * self._width * self.hidden_dim + biases

    @property
    def parameters(self) -> int:
        """Of all experts, and the gate's d · e."""
        return self._e * self.parameters_per_expert + self.dim * self._e

    @property
    def active_parameters(self) -> int:
        """What one token meets: k experts and the gate."""
        return round(self._k * self.parameters_per_expert) + self.dim * self._e

    @property
    def flops_per_token(self) -> float:
        """2·(k·d·h·g + k·h·d) + 2·d·e + e of a forward, with g = 2 if gated, else 1.

        The last e is one operation on each logit, a bias or the score function. ``model_flops``
        counts products only and lacks it.

        Source: MagpieTTS MoE (NeMo 3.0), FLOPs of its layer.
        """
        experts = dense_flops_per_token(
            dim=self._width, hidden_dim=self.hidden_dim, gated=self.gated
        )
        return self._k * experts + 2 * self.dim * self._e + self._e

    def reduction(self, dense_dim: int | None = None) -> float:
        """Share of a dense network's FLOPs that is saved; negative where the layer costs more.

        Args:
            dense_dim: f; None: 4·d.
        """
        dense = dense_flops_per_token(
            dim=self.dim, hidden_dim=dense_dim or 4 * self.dim, gated=self.gated
        )
        return 1 - self.flops_per_token / dense


def dense_flops_per_token(*, dim: int, hidden_dim: int, gated: bool = True) -> int:
    """2·(d·f·g + f·d) of a forward through one network of width ``hidden_dim``."""
    return 2 * (2 + gated) * dim * hidden_dim


def matched_hidden_dim(*, intermediate_dim: int, experts_per_token: int) -> int:
    """h = f / k: k experts of this width cost a token what a dense network of width f costs.

    Args:
        intermediate_dim: f.
        experts_per_token: k.

    Raises:
        InputError: k is below 1 or does not divide f; the nearest width that it divides is named.
    """
    if experts_per_token < 1 or intermediate_dim < 1:
        raise InputError(
            f"intermediate_dim ({intermediate_dim}) and experts_per_token ({experts_per_token}) "
            "must be at least 1"
        )
    hidden_dim, rest = divmod(intermediate_dim, experts_per_token)
    if rest:
        nearest = max(1, hidden_dim + (2 * rest > experts_per_token))
        raise InputError(
            f"intermediate_dim {intermediate_dim} cannot be shared evenly by {experts_per_token} "
            f"experts a token: the nearest that can is {nearest * experts_per_token}, with "
            f"hidden_dim {nearest}"
        )
    return hidden_dim
