"""A decoder's layer: attention, and an mlp that is told which tokens are real.

Letters: b batch · s sequence · d dim.
"""

import functools
import inspect
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchtune.modules import TransformerSelfAttentionLayer

from moe_builders.errors import InputError
from moe_builders.moe import moe_layers
from moe_builders.ops.documents import Documents
from moe_builders.routing import TokenInfo


class MoEDecoderLayer(TransformerSelfAttentionLayer):
    """torchtune's pre-norm layer that hands ``info`` on to a MoE in its mlp slot.

    Any mlp whose forward has an ``info`` argument gets it; one that hides a MoE inside without
    taking ``info`` is refused, since the MoE would route padding. An attention that says
    ``takes_documents = True`` gets ``Documents`` as they are, any other the mask that they mean.
    """

    mlp_takes_info = False
    mlp_routes = False

    def __setattr__(self, name: str, value: Any) -> None:
        """Look at an mlp when it is put in, also when it replaces another one later."""
        super().__setattr__(name, value)
        if name == "mlp":
            mlp = getattr(value, "_orig_mod", value)  # inside what torch.compile(mlp) returns
            self.mlp_takes_info = "info" in inspect.signature(mlp.forward).parameters
            self.mlp_routes = any(True for _ in moe_layers(mlp))
            if not self.mlp_takes_info and self.mlp_routes:
                raise InputError(
                    f"the mlp {type(mlp).__name__} holds a MoE, but its forward does not take "
                    "info, which says which tokens are real: give it that argument and hand it on"
                )

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | Documents | None = None,
        input_pos: Tensor | None = None,
        info: TokenInfo | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """[b, s, d] -> [b, s, d]; see ``MoEDecoder.forward`` for the rest.

        Args:
            recompute: make attention, and an mlp without experts, again in backward; experts keep
                what they save.
        """
        if isinstance(mask, Documents) and not getattr(self.attn, "takes_documents", False):
            mask = mask.mask(rows=x.shape[0], positions=x.shape[1])
        attend, transform = self._attend, self._transform
        if recompute:
            attend = functools.partial(checkpoint, attend, use_reentrant=False)
            if not self.mlp_routes:
                transform = functools.partial(checkpoint, transform, use_reentrant=False)
        return transform(attend(x, mask, input_pos), info)

    def _attend(
        self, x: Tensor, mask: Tensor | Documents | None, input_pos: Tensor | None
    ) -> Tensor:
        normed = self.sa_norm(x)
        return x + self.sa_scale(self.attn(normed, normed, mask=mask, input_pos=input_pos))

    def _transform(self, h: Tensor, info: TokenInfo | None) -> Tensor:
        normed = self.mlp_norm(h)
        out = self.mlp(normed, info=info) if self.mlp_takes_info else self.mlp(normed)
        return h + self.mlp_scale(out)
