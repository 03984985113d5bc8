"""The routed experts on a CPU: a few at a time, so that what lies between is small.

Letters: t tokens · a assignments (sorted by expert; dead ones last) · e experts · d dim ·
w = 2h (ungated: h).

Copied rows, activated rows and their gradients are as large as what is kept, and tensors of tens of
megabytes are memory that the system hands out anew in every step: a third as long as the products
take. A block's are small, and lie where the last block's lay. What is larger than a block (z,
answers, gradients) is written in place. Each row is computed as ``ops.routed_passes`` does it for
all.
"""

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from moe_builders.ops.routed_passes import Given, How, add_home, backward_rows, forward_rows

ROWS = 1024  # of a block, at least, but for the last one
_IN_PLACE = ("up", "down", "x")  # what ``backward_rows`` writes where it is told to
_OF_EXPERTS = ("up", "down", "up_bias", "down_bias", "hidden_scale", "num_tokens_per_expert")
_OF_ROWS = ("token_index", "input_weights", "row_weights", "output_weights")


class Block(NamedTuple):
    """Some experts, and their rows."""

    experts: slice
    rows: slice


def takes_blocks(backend: str, dtype: torch.dtype) -> bool:
    """Whether it is worth it on a CPU: experts are multiplied one by one, in fp32 or wider.

    In half precision what lies between is half as large; blocks did not make it faster.
    """
    return backend in ("auto", "loop") and dtype.itemsize >= torch.float32.itemsize


def find_blocks(given: Given, how: How) -> list[Block]:
    """Of all live rows, in order; the host reads the counts. None where one would be all, on other
    devices, and where a product takes all experts at once."""
    if (
        not given.x.is_cpu
        or how.kernels == "triton"
        or not takes_blocks(how.backend, given.x.dtype)
    ):
        return []
    blocks = list(_blocks(given.num_tokens_per_expert))
    return blocks if len(blocks) > 1 else []


def forward_blocks(given: Given, how: How, blocks: list[Block]) -> tuple[Tensor, Tensor]:
    """As ``forward_passes``."""
    x, a = given.x, _num_rows(given)
    y = x.new_empty(a, given.down.shape[1])  # [a, d]
    z = x.new_empty(0) if how.recompute_up else x.new_empty(a, given.up.shape[1])  # [a, w]
    for block in blocks:
        own_z = None if how.recompute_up else z[block.rows]
        forward_rows(_cut(given, block), how, y[block.rows], own_z)
    y[blocks[-1].rows.stop :] = 0
    z[blocks[-1].rows.stop :] = 0
    return add_home(y, given, given.output_weights, how), z


def backward_blocks(
    grad: Tensor, z: Tensor, given: Given, how: How, wanted: Collection[str], blocks: list[Block]
) -> dict[str, Tensor]:
    """As ``backward_passes``, and those that are wanted alone."""
    dead = slice(blocks[-1].rows.stop, None)
    found = {}
    for name in wanted:
        like: Tensor = getattr(given, name)
        shape = (_num_rows(given), like.shape[1]) if name == "x" else like.shape
        found[name] = like.new_empty(shape)
        if name not in _OF_EXPERTS:
            found[name][dead] = 0
    for block in blocks:
        places = {n: block.experts if n in _OF_EXPERTS else block.rows for n in wanted}
        out = {n: found[n][places[n]] for n in wanted if n in _IN_PLACE}
        own_z = z if how.recompute_up else z[block.rows]
        own_grad = grad if given.token_index is not None else grad[block.rows]
        gradients = backward_rows(own_grad, own_z, _cut(given, block), how, wanted, out)
        for name in wanted:
            if name not in _IN_PLACE:
                found[name][places[name]] = gradients[name]
    if "x" in wanted:
        found["x"] = add_home(found["x"], given, given.input_weights, how)
    return found


def _num_rows(given: Given) -> int:
    return (given.x if given.token_index is None else given.token_index).shape[0]


def _blocks(num_tokens_per_expert: Tensor) -> Iterator[Block]:
    first = start = rows = 0
    counts = num_tokens_per_expert.tolist()
    for expert, count in enumerate(counts):
        rows += count
        if rows >= ROWS or expert + 1 == len(counts):
            yield Block(slice(first, expert + 1), slice(start, start + rows))
            first, start, rows = expert + 1, start + rows, 0


def _cut(given: Given, block: Block) -> Given:
    """Of these experts and rows alone; x are all tokens, or these rows."""
    parts = {}
    for names, place in ((_OF_EXPERTS, block.experts), (_OF_ROWS, block.rows)):
        for name in names:
            whole = getattr(given, name)
            parts[name] = None if whole is None else whole[place]
    if given.token_index is None:
        parts["x"] = given.x[block.rows]
    return given._replace(slot_of=None, **parts)
