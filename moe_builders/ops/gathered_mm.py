"""The grouped product of few rows: each row's matrix is gathered, and all are multiplied at once.

Letters: a rows (assignments, sorted by expert) · e experts · i in-features · o out-features.

For decoding, where a layer sees one or a few tokens: no number is read on the host, in any dtype
and on any GPU. It copies a matrix per row, so it is for few rows only; and it has no gradient,
since that of a gathered copy is as large as all experts and is added in no fixed order.
"""

import torch
from torch import Tensor

from moe_builders.errors import InputError
from moe_builders.ops.runs import live_rows

MOST_ROWS = 32  # and not more than experts: never more copied than the layer holds
_HOPPER = (9, 0)


def gathered_mm(x: Tensor, weight: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
    """y[r] = weight[expert of r] @ x[r]; zero past the last run.

    Args:
        x: [a, i] rows sorted by expert.
        weight: [e, o, i], any strides.
        num_tokens_per_expert: [e] int.

    Returns:
        [a, o].
    """
    live, expert = live_rows(num_tokens_per_expert, x.shape[0])
    own = weight.index_select(0, expert)  # [a, o, i]
    y = torch.bmm(own, x[:, :, None]).squeeze(-1)  # [a, o]
    return torch.where(live[:, None], y, 0)


def takes_gathered(backend: str, x: Tensor, weight: Tensor) -> bool:
    """Whether this way is asked for, or the best there is.

    The latter without gradients, on a GPU where torch's grouped product has no kernel of its own
    and would wait for the counts, and for at most ``MOST_ROWS`` rows and one per expert. On a CPU
    the other ways read the same matrices without copying them.

    Raises:
        InputError: "gather" where a gradient is wanted.
    """
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if backend == "gather" and wanted:
        raise InputError(
            "the back end 'gather' has no gradient: use 'auto', or compute under torch.no_grad()"
        )
    if backend != "auto" or torch.is_grad_enabled() or not x.is_cuda:
        return backend == "gather"
    few = x.shape[0] <= min(MOST_ROWS, weight.shape[0])
    return few and not has_kernel(x.dtype, x.device)


def has_kernel(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch's grouped product is one kernel on that GPU, which waits for no count."""
    if dtype != torch.bfloat16:
        return False
    gpu = torch.cuda.get_device_properties(device)  # which a compiler folds; not the capability
    return (gpu.major, gpu.minor) >= _HOPPER
