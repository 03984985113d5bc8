"""torchtune's TransformerDecoder with a MoE in each ``mlp`` slot, told which tokens are real.

Letters: b batch · s sequence · t = b·s tokens · d dim · v vocabulary.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchtune.modules import TiedLinear, TransformerDecoder, TransformerSelfAttentionLayer

from moe_builders.errors import InputError
from moe_builders.moe import moe_layers
from moe_builders.routing import TokenInfo

LayerBuilder = nn.Module | Callable[[int], nn.Module]
NormPosition = Literal["before", "after"]


class MoEDecoderLayer(TransformerSelfAttentionLayer):
    """torchtune's pre-norm layer that hands ``info`` on to a MoE in its mlp slot.

    Any mlp whose forward has an ``info`` argument gets it; one that hides a MoE inside without
    taking ``info`` is refused, since the MoE would route padding.
    """

    mlp_takes_info = False

    def __setattr__(self, name: str, value: Any) -> None:
        """Look at an mlp when it is put in, also when it replaces another one later."""
        super().__setattr__(name, value)
        if name == "mlp":
            mlp = getattr(value, "_orig_mod", value)  # inside what torch.compile(mlp) returns
            self.mlp_takes_info = "info" in inspect.signature(mlp.forward).parameters
            if not self.mlp_takes_info and any(moe_layers(mlp)):
                raise InputError(
                    f"the mlp {type(mlp).__name__} holds a MoE, but its forward does not take "
                    "info, which says which tokens are real: give it that argument and hand it on"
                )

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
        info: TokenInfo | None = None,
    ) -> Tensor:
        """[b, s, d] -> [b, s, d]; see ``MoEDecoder.forward`` for the rest."""
        normed = self.sa_norm(x)
        h = x + self.sa_scale(self.attn(normed, normed, mask=mask, input_pos=input_pos))
        normed = self.mlp_norm(h)
        out = self.mlp(normed, info=info) if self.mlp_takes_info else self.mlp(normed)
        return h + self.mlp_scale(out)


class MoEDecoder(TransformerDecoder):
    """A torchtune TransformerDecoder whose layers know which tokens are real.

    Called with tokens alone it means: all real, one sequence a row.

    Attributes:
        activation_checkpointing: recompute each layer in backward instead of keeping its
            activations; numbers do not change.
        kept_activations: a context around the layers' forward, which may keep what they save for
            backward somewhere else (``torch.autograd.graph.saved_tensors_hooks``).
        probe: called with (name, [b, s, d]) of the embedding and of each layer's output, in every
            forward but not in its recomputation; None: nobody looks.
        embedding_scale: multiplies the embeddings.
        logits_scale: multiplies the logits.
    """

    activation_checkpointing = False
    kept_activations: AbstractContextManager = nullcontext()
    probe: Callable[[str, Tensor], None] | None = None
    embedding_scale = 1.0
    logits_scale = 1.0

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
        info: TokenInfo | None = None,
    ) -> Tensor | list[Tensor]:
        """Next-token logits.

        Args:
            tokens: [b, s] int.
            mask: [b, s, s] bool, True = may attend; None: causal.
            input_pos: [b, s] int, positions within each document; None: 0 … s-1.
            info: what routers may know of the t tokens; None: all real, one document a row. Its
                input_ids, where missing, are ``tokens``.

        Returns:
            [b, s, v] in fp32 (fp64 for fp64 models); after ``set_num_output_chunks`` chunks of it
            along s in the model's dtype, as torchtune's chunked loss wants them.
        """
        b, s = tokens.shape
        self._validate_inputs(s, mask=mask, input_pos=input_pos)
        if info is None:
            rows = torch.arange(b, device=tokens.device).repeat_interleave(s)  # [t]
            info = TokenInfo(sequence_ids=rows, input_ids=tokens.flatten())
        elif info.input_ids is None:  # known here, whoever made info
            info = replace(info, input_ids=tokens.flatten())
        h = self.tok_embeddings(tokens)  # [b, s, d]
        if self.embedding_scale != 1.0:
            h = h * self.embedding_scale
        if self.probe is not None:
            self.probe("tok_embeddings", h)
        with self.kept_activations:
            for number, layer in enumerate(self.layers):
                if self.activation_checkpointing and torch.is_grad_enabled():
                    h = checkpoint(
                        layer,
                        h,
                        mask=mask,
                        input_pos=input_pos,
                        info=info,
                        use_reentrant=False,
                        context_fn=functools.partial(_recomputation_contexts, layer),
                    )
                else:
                    h = layer(h, mask=mask, input_pos=input_pos, info=info)
                if self.probe is not None:
                    self.probe(f"layers.{number}", h)
        return self.unembed(h)

    def unembed(self, h: Tensor) -> Tensor | list[Tensor]:
        """[b, s, d] -> logits; torchtune's own would round fp64 to fp32."""
        h = self.norm(h)
        if self.num_output_chunks > 0:
            chunks: Any = self.chunked_output(h)  # pyright: ignore (torch hides its type)
            return chunks if self.logits_scale == 1.0 else [c * self.logits_scale for c in chunks]
        project: Callable[[Tensor], Tensor] = self.output  # pyright: ignore[reportAssignmentType]
        logits = project(h)  # [b, s, v]
        if self.logits_scale != 1.0:
            logits = logits * self.logits_scale
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def moe_decoder(
    *,
    vocab_size: int,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    head_dim: int,
    max_seq_len: int,
    attention: LayerBuilder,
    mlp: LayerBuilder,
    norm_eps: float = 1e-6,
    tie_word_embeddings: bool = False,
    output_bias: bool = False,
    norm_position: NormPosition = "before",
    residual_scale: float = 1.0,
    embedding_scale: float = 1.0,
    logits_scale: float = 1.0,
) -> MoEDecoder:
    """Assemble a decoder from an attention and an mlp per layer.

    Args:
        vocab_size: v.
        embed_dim: d.
        num_layers: layers.
        num_heads, head_dim: of the attention; read by torchtune's generation helpers.
        max_seq_len: longer inputs are refused.
        attention, mlp: a function layer number -> module, or one module that each layer gets a
            copy of. An mlp is a module [b, s, d] -> [b, s, d]; one whose forward has an argument
            ``info`` (as ``MoE``'s has) is told which tokens are real.
        norm_eps: of every RMSNorm.
        tie_word_embeddings: the output shares the embedding's weight.
        output_bias: the output has a bias; not with tied embeddings.
        norm_position: a layer's norms see what goes into attention and mlp ("before", nearly all
            models) or what comes out of them ("after", OLMo 2).
        residual_scale: multiplies what comes out of them.
        embedding_scale, logits_scale: of ``MoEDecoder``.

    Raises:
        InputError: num_layers below 1, an unknown norm_position, or an output_bias with tied
            embeddings.
    """
    if num_layers < 1:
        raise InputError(f"num_layers is {num_layers}, but a decoder needs at least 1")
    if norm_position not in get_args(NormPosition):
        raise InputError(f"norm_position {norm_position!r} is not one of before, after")
    if norm_position == "after" and residual_scale != 1.0:
        raise InputError("residual_scale needs norm_position 'before'")
    if output_bias and tie_word_embeddings:
        raise InputError("an output that is the embedding has no bias of its own: untie them")
    tok_embeddings = nn.Embedding(vocab_size, embed_dim)
    output = (
        TiedLinear(tok_embeddings)
        if tie_word_embeddings
        else nn.Linear(embed_dim, vocab_size, bias=output_bias)
    )
    layers = [
        MoEDecoderLayer(
            attn=_build(attention, number),  # pyright: ignore[reportArgumentType]
            mlp=_build(mlp, number),
            **_around_branches(embed_dim, norm_eps, norm_position, residual_scale),
        )
        for number in range(num_layers)
    ]
    decoder = MoEDecoder(
        tok_embeddings=tok_embeddings,
        layers=nn.ModuleList(layers),
        max_seq_len=max_seq_len,
        num_heads=num_heads,
        head_dim=head_dim,
        norm=nn.RMSNorm(embed_dim, eps=norm_eps),
        output=output,
    )
    decoder.embedding_scale, decoder.logits_scale = embedding_scale, logits_scale
    return decoder


class _Scale(nn.Module):
    """x -> factor · x."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def _around_branches(
    dim: int, eps: float, position: NormPosition, residual_scale: float
) -> dict[str, nn.Module]:
    """What torchtune's layer puts before (``_norm``) and after (``_scale``) its two branches."""
    place = "norm" if position == "before" else "scale"
    modules: dict[str, nn.Module] = {
        f"{branch}_{place}": nn.RMSNorm(dim, eps=eps) for branch in ("sa", "mlp")
    }
    if residual_scale != 1.0:
        modules |= {f"{branch}_scale": _Scale(residual_scale) for branch in ("sa", "mlp")}
    return modules


def _recomputation_contexts(
    layer: nn.Module,
) -> tuple[AbstractContextManager, AbstractContextManager]:
    """(around the forward, around its recomputation), as ``checkpoint`` asks for them."""
    return nullcontext(), _keep_last_routing(layer)


@contextmanager
def _keep_last_routing(layer: nn.Module) -> Iterator[None]:
    """Put back each MoE's ``last_routing`` at the end.

    Recomputation is no forward of its own: its routing would stand there as the last one and hold
    on to all that was recomputed, which checkpointing is to save.
    """
    kept = [(moe, moe.last_routing) for _, moe in moe_layers(layer)]
    try:
        yield
    finally:
        for moe, routing in kept:
            moe.last_routing = routing


def _build(builder: LayerBuilder, number: int) -> nn.Module:
    if isinstance(builder, nn.Module):
        return copy.deepcopy(builder)
    return builder(number)
