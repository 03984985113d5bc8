"""A layer run again in backward: it decides what its forward did, and counts as no forward.

Letters: b batch · s sequence · d dim.
"""

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_builders.decisions import Decisions
from moe_builders.moe import MoE, moe_layers
from moe_builders.ops.documents import Documents
from moe_builders.routing import Routing, TokenInfo


def recomputed(
    layer: nn.Module,
    h: Tensor,
    *,
    mask: Tensor | Documents | None,
    input_pos: Tensor | None,
    info: TokenInfo,
) -> Tensor:
    """A decoder's layer of which nothing is kept but its input and what its routers decided.

    Args:
        layer: called as ``MoEDecoder`` calls its layers.
        h: [b, s, d].
        mask, input_pos, info: of ``MoEDecoder.forward``.
    """
    decisions = Decisions()
    return checkpoint(
        layer,
        h,
        mask=mask,
        input_pos=input_pos,
        info=replace(info, decisions=decisions),
        use_reentrant=False,
        context_fn=functools.partial(_contexts, layer, decisions),
    )


def _contexts(
    layer: nn.Module, decisions: Decisions
) -> tuple[AbstractContextManager, AbstractContextManager]:
    """(around the forward, around its recomputations), as ``checkpoint`` asks for them."""
    return nullcontext(), _Recomputation(layer, decisions)


class _Recomputation(AbstractContextManager[None]):
    """Around a layer's recomputations: they decide as the forward did, and count as no forward.

    A recomputation's routing would stand in ``last_routing`` as the last one and hold on to all
    that was recomputed, which checkpointing is to save. Entered anew by each backward.
    """

    def __init__(self, layer: nn.Module, decisions: Decisions) -> None:
        self.layer, self.decisions = layer, decisions
        self._last: list[tuple[MoE, Routing | None]] = []

    def __enter__(self) -> None:
        self._last = [(moe, moe.last_routing) for _, moe in moe_layers(self.layer)]
        self.decisions.start_again()

    def __exit__(self, *_: object) -> None:
        self.decisions.end()
        for moe, routing in self._last:
            moe.last_routing = routing
        self._last = []
