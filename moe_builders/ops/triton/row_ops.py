"""All of ``ops.row_ops`` on a GPU: kernels where there is one, the plain function elsewhere."""

from moe_builders.ops.row_ops import sum_tokens
from moe_builders.ops.triton.activations import activate, activate_backward
from moe_builders.ops.triton.rows import (
    add_expert_rows_,
    row_products,
    sum_slots,
    take_rows,
    weigh_rows,
    zero_tail_,
)

__all__ = [
    "activate",
    "activate_backward",
    "add_expert_rows_",
    "row_products",
    "sum_slots",
    "sum_tokens",
    "take_rows",
    "weigh_rows",
    "zero_tail_",
]
