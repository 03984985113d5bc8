"""Models that go wrong at a chosen place, on a chosen process, in a chosen forward or backward."""

import torch
from torch import nn

from moe_builders.families.qwen3_moe import qwen3_moe_tiny


def faulty_model(
    *, where: str, rank: int = 0, call: int = 2, number: float = float("nan"), vocab_size: int
):
    """A tiny decoder whose ``call``-th training forward is hurt on one process.

    Args:
        where: "weights": of layer 1's output_proj; "embedding"; "backward": the gradient behind
            layer 1's mlp; "gradient": one element of a weight's own; "loss": the final norm.
        rank: of the process; -1: all.
        call: which training forward.
        number: what is put in.
    """
    model = qwen3_moe_tiny(vocab_size=vocab_size)
    calls = 0

    def due() -> bool:
        here = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return calls == call and rank in (here, -1)

    def count(module, args, kwargs=None):
        nonlocal calls
        calls += module.training and torch.is_grad_enabled()

    def hurt_weights(module, args):
        if due():
            module.weight.data.fill_(number)

    def hurt_output(module, args, output):
        return output + torch.full_like(output, number) if due() else output

    def hurt_backward(module, args, output):
        return _Hurt.apply(output, number) if due() else output

    model.register_forward_pre_hook(count)
    layer = model.layers[1]
    match where:
        case "weights":
            layer.attn.output_proj.register_forward_pre_hook(hurt_weights)
        case "embedding":
            model.tok_embeddings.register_forward_hook(hurt_output)
        case "backward":
            layer.mlp.register_forward_hook(hurt_backward)
        case "loss":
            model.norm.register_forward_hook(hurt_output)
        case "gradient":
            layer.attn.output_proj.register_forward_pre_hook(
                lambda module, args: _HurtWeight.arm(module, number) if due() else None
            )
    return model


class _Hurt(torch.autograd.Function):
    """Passes values on and hurts the gradient that comes back."""

    @staticmethod
    def forward(ctx, x, number):
        ctx.number = number
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad + ctx.number, None


class _HurtWeight:
    @staticmethod
    def arm(module: nn.Module, number: float) -> None:
        """Put a number into the weight's gradient and nowhere else."""

        def hurt(grad):
            grad = grad.clone()
            grad[0, 0] = number
            return grad

        module.weight.register_hook(hurt)


class EvenDataset:
    """Documents of 8 tokens, all labelled: their attended pairs are known without looking."""

    LENGTH = 8

    def __init__(self, tokenizer, num_samples=16):
        stream = torch.Generator().manual_seed(0)
        shape = (num_samples, self.LENGTH)
        self.rows = torch.randint(0, 64, shape, generator=stream).tolist()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"tokens": self.rows[index], "labels": self.rows[index]}
