"""A MoE layer between dense feed-forward networks, as one block.

Letters: b batch · s sequence · d dim · h hidden_dim of a dense network.
"""

from torch import Tensor, nn

from moe_builders.moe import MoE, shared_experts
from moe_builders.routing import TokenInfo


class SparseMoEBlock(nn.Module):
    """A MoE layer with a dense network before and after it, each pre-normed with a residual.

        x = x + ff_before(norm(x));  x = x + moe(norm(x));  x = x + ff_after(norm(x))

    A dense network next to the sparse one steadies training and improves results.

    Args:
        moe: the sparse layer.
        dim: d.
        ff_before, ff_after: modules [.., d] -> [.., d], without a norm of their own; None: left
            out.
        norm_eps: of the RMSNorms.
        residual: True: the block is a layer of its own and returns the stream. False: it returns
            only what is to be added to x, for the ``mlp`` slot of a decoder's layer, which adds
            that itself; the block then sees what the layer's own norm made of the stream.

    Source: Zoph et al. 2022 (2202.08906) appendix C ("additional FFN layers").
    """

    def __init__(
        self,
        *,
        moe: MoE,
        dim: int,
        ff_before: nn.Module | None = None,
        ff_after: nn.Module | None = None,
        norm_eps: float = 1e-6,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.ff_before, self.ff_before_norm = ff_before, None
        if ff_before is not None:
            self.ff_before_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.moe_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.moe = moe
        self.ff_after, self.ff_after_norm = ff_after, None
        if ff_after is not None:
            self.ff_after_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.residual = residual

    def forward(self, x: Tensor, info: TokenInfo | None = None) -> Tensor:
        """Apply the block.

        Args:
            x: [b, s, d] or [t, d].
            info: what is known of the tokens; None: all real. Masked ones pass the dense networks
                and get nothing from the experts.

        Returns:
            Same shape and dtype as x.
        """
        added = None
        if self.ff_before is not None and self.ff_before_norm is not None:
            added = self.ff_before(self.ff_before_norm(x))
            x = x + added
        sparse = self.moe(self.moe_norm(x), info)
        x = x + sparse
        added = sparse if added is None else added + sparse
        if self.ff_after is not None and self.ff_after_norm is not None:
            last = self.ff_after(self.ff_after_norm(x))
            x, added = x + last, added + last
        return x if self.residual else added


def sparse_moe_block(
    *,
    embed_dim: int,
    moe: MoE,
    add_ff_before: bool = False,
    add_ff_after: bool = True,
    ff_hidden_dim: int | None = None,
    norm_eps: float = 1e-6,
    residual: bool = True,
) -> SparseMoEBlock:
    """A ``SparseMoEBlock`` with SwiGLU networks.

    Args:
        embed_dim: d.
        moe: the sparse layer.
        add_ff_before, add_ff_after: which of the two there are.
        ff_hidden_dim: h of each; default ⌊8·d / 3⌋.
        norm_eps, residual: of ``SparseMoEBlock``.
    """
    hidden = 8 * embed_dim // 3 if ff_hidden_dim is None else ff_hidden_dim
    before, after = (
        shared_experts(embed_dim=embed_dim, shared_hidden_dim=hidden) if wanted else None
        for wanted in (add_ff_before, add_ff_after)
    )
    return SparseMoEBlock(
        moe=moe,
        dim=embed_dim,
        ff_before=before,
        ff_after=after,
        norm_eps=norm_eps,
        residual=residual,
    )
