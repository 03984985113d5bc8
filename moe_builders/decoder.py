"""torchtune's TransformerDecoder with a MoE in each ``mlp`` slot, told which tokens are real.

Letters: b batch · s sequence · t = b·s tokens · d dim · v vocabulary.
"""

import copy
import functools
import inspect
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchtune.modules import TiedLinear, TransformerDecoder, TransformerSelfAttentionLayer

from moe_builders.errors import InputError
from moe_builders.moe import MoE
from moe_builders.routing import TokenInfo

LayerBuilder = nn.Module | Callable[[int], nn.Module]


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
            if not self.mlp_takes_info and any(isinstance(m, MoE) for m in mlp.modules()):
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
    """

    activation_checkpointing = False
    kept_activations: AbstractContextManager = nullcontext()
    probe: Callable[[str, Tensor], None] | None = None

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
            info: what routers may know of the t tokens; None: all real, one document a row.

        Returns:
            [b, s, v] in fp32 (fp64 for fp64 models); after ``set_num_output_chunks`` chunks of it
            along s in the model's dtype, as torchtune's chunked loss wants them.
        """
        b, s = tokens.shape
        self._validate_inputs(s, mask=mask, input_pos=input_pos)
        if info is None:
            rows = torch.arange(b, device=tokens.device).repeat_interleave(s)  # [t]
            info = TokenInfo(sequence_ids=rows, input_ids=tokens.flatten())
        h = self.tok_embeddings(tokens)  # [b, s, d]
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
            return self.chunked_output(h)  # pyright: ignore (torch's decorator hides its type)
        project: Callable[[Tensor], Tensor] = self.output  # pyright: ignore[reportAssignmentType]
        logits = project(h)  # [b, s, v]
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
) -> MoEDecoder:
    """Assemble a pre-norm decoder from an attention and an mlp per layer.

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

    Raises:
        InputError: num_layers below 1.
    """
    if num_layers < 1:
        raise InputError(f"num_layers is {num_layers}, but a decoder needs at least 1")
    tok_embeddings = nn.Embedding(vocab_size, embed_dim)
    output = (
        TiedLinear(tok_embeddings)
        if tie_word_embeddings
        else nn.Linear(embed_dim, vocab_size, bias=False)
    )
    layers = [
        MoEDecoderLayer(
            attn=_build(attention, number),  # pyright: ignore[reportArgumentType]
            mlp=_build(mlp, number),
            sa_norm=nn.RMSNorm(embed_dim, eps=norm_eps),
            mlp_norm=nn.RMSNorm(embed_dim, eps=norm_eps),
        )
        for number in range(num_layers)
    ]
    return MoEDecoder(
        tok_embeddings=tok_embeddings,
        layers=nn.ModuleList(layers),
        max_seq_len=max_seq_len,
        num_heads=num_heads,
        head_dim=head_dim,
        norm=nn.RMSNorm(embed_dim, eps=norm_eps),
        output=output,
    )


def initial_value(name: str, like: Tensor, *, seed: int, std: float = 0.02) -> Tensor:
    """A fresh value of one parameter or buffer on the CPU: the same on any number of processes.

    Matrices N(0, std); norm weights 1; biases and buffers 0. Each name has a random stream of its
    own, so that neither order nor sharding matters.

    Args:
        name: dotted parameter name.
        like: gives global shape and dtype.
        seed: of the run.
        std: of the matrices.
    """
    value = torch.zeros(like.shape, dtype=like.dtype)
    if name.endswith(("norm.weight", ".scale")):  # torch's and torchtune's RMSNorm
        return value.fill_(1)
    if name.endswith("bias"):
        return value
    stream = torch.Generator().manual_seed((zlib.crc32(name.encode()) << 20) ^ seed)
    return value.normal_(0, std, generator=stream)


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
    kept = [(module, module.last_routing) for module in layer.modules() if isinstance(module, MoE)]
    try:
        yield
    finally:
        for module, routing in kept:
            module.last_routing = routing


def initialize(model: nn.Module, *, seed: int, std: float | None) -> None:
    """Give every matrix of a model on the CPU its ``initial_value``.

    What has fewer than two dims (norm weights, biases, a router's temperature) and all buffers
    stay as their modules made them.

    Args:
        model: real, not on the meta device.
        seed: of the run.
        std: of the matrices; None: keep what the modules drew when they were built.
    """
    if std is None:
        return
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                continue
            parameter.copy_(initial_value(name, parameter, seed=seed, std=std))


def _build(builder: LayerBuilder, number: int) -> nn.Module:
    if isinstance(builder, nn.Module):
        return copy.deepcopy(builder)
    return builder(number)
