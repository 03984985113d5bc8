"""torchtune's TransformerDecoder with a MoE in each ``mlp`` slot, told which tokens are real.

Letters: b batch · s sequence · t = b·s tokens · d dim · v vocabulary.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torchtune.modules import TiedLinear, TransformerDecoder

from moe_builders.decoder_layer import MoEDecoderLayer
from moe_builders.errors import InputError
from moe_builders.losses import cross_entropy_sum
from moe_builders.ops.documents import Documents
from moe_builders.ops.output_loss import output_cross_entropy_sum, weight_and_bias
from moe_builders.recomputation import recomputed
from moe_builders.routing import TokenInfo

LayerBuilder = nn.Module | Callable[[int], nn.Module]
NormPosition = Literal["before", "after"]
ACMode = Literal["full", "selective"]


class MoEDecoder(TransformerDecoder):
    """A torchtune TransformerDecoder whose layers know which tokens are real.

    Called with tokens alone it means: all real, one sequence a row.

    Attributes:
        activation_checkpointing: recompute each layer in backward instead of keeping its
            activations; numbers do not change.
        ac_mode: what of it: "full": all but the decisions of routers and capacities; "selective":
            attention and dense mlps, so that no expert computes twice.
        kept_activations: a context around the layers' forward, which may keep what they save for
            backward somewhere else (``torch.autograd.graph.saved_tensors_hooks``).
        takes_documents: ``mask`` may be ``Documents``.
        probe: called with (name, [b, s, d]) of the embedding and of each layer's output, in every
            forward but not in its recomputation; None: nobody looks.
        embedding_scale: multiplies the embeddings.
        logits_scale: multiplies the logits.
        linear_cross_entropy: how a loss is made, see ``ops.output_loss``; "none": from logits.
    """

    takes_documents = True
    activation_checkpointing = False
    ac_mode: str = "full"
    kept_activations: AbstractContextManager = nullcontext()
    probe: Callable[[str, Tensor], None] | None = None
    embedding_scale = 1.0
    logits_scale = 1.0
    linear_cross_entropy = "chunked"

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        tokens: Tensor,
        *,
        mask: Tensor | Documents | None = None,
        input_pos: Tensor | None = None,
        info: TokenInfo | None = None,
        labels: Tensor | None = None,
        divisor: Tensor | None = None,
        skip_output_layer: bool = False,
    ) -> Tensor | list[Tensor]:
        """Next-token logits, or a loss: made here, where FSDP2 has gathered the output.

        Args:
            tokens: [b, s] int.
            mask: [b, s, s] bool, True = may attend; the documents of packed rows, which need no
                mask; None: causal.
            input_pos: [b, s] int, positions within each document; None: 0 … s-1.
            info: what routers may know of the t tokens; None: all real, one document a row. Its
                input_ids, where missing, are ``tokens``.
            labels: [b, s] int, the token to predict at each position; IGNORE_INDEX = none.
            divisor: [] int, what the loss is divided by; see ``linear_cross_entropy_sum``.
            skip_output_layer: of interest is what routers did, labels or not.

        Returns:
            [b, s, v] in fp32 (fp64 for fp64 models); after ``set_num_output_chunks`` chunks of it
            along s in the model's dtype, as torchtune's chunked loss wants them. With labels their
            summed cross-entropy [nats] in fp32 (fp64); without the output layer what reaches it.
        """
        b, s = tokens.shape
        self._validate_inputs(s, mask=mask, input_pos=input_pos)  # pyright: ignore (None or not)
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
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        if recompute and self.ac_mode not in get_args(ACMode):
            raise InputError(f"ac_mode {self.ac_mode!r} is not one of full, selective")
        with self.kept_activations:
            for number, layer in enumerate(self.layers):
                if recompute and self.ac_mode == "selective":
                    h = layer(h, mask=mask, input_pos=input_pos, info=info, recompute=True)
                elif recompute:
                    h = recomputed(layer, h, mask=mask, input_pos=input_pos, info=info)
                else:
                    h = layer(h, mask=mask, input_pos=input_pos, info=info)
                if self.probe is not None:
                    self.probe(f"layers.{number}", h)
        if skip_output_layer:
            return self.norm(h)
        return self.unembed(h) if labels is None else self.loss(h, labels, divisor)

    def loss(self, h: Tensor, labels: Tensor, divisor: Tensor | None = None) -> Tensor:
        """[b, s, d] of the last layer -> summed cross-entropy []; see ``forward``."""
        if self.linear_cross_entropy == "none":
            total = cross_entropy_sum(self.unembed(h), labels)
            return total if divisor is None else total / divisor
        return output_cross_entropy_sum(
            self.norm(h).flatten(0, 1), *weight_and_bias(self.output), labels.flatten(),
            way=self.linear_cross_entropy, scale=self.logits_scale, divisor=divisor,
        )  # fmt: skip

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


def _build(builder: LayerBuilder, number: int) -> nn.Module:
    if isinstance(builder, nn.Module):
        return copy.deepcopy(builder)
    return builder(number)
