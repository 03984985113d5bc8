"""Which position may look at which.

Letters: b batch · s query positions · c key positions.
"""

import torch
from torch import Tensor


def block_causal_mask(sequence_ids: Tensor) -> Tensor:
    """[b, s] document numbers -> [b, s, s] bool: a token sees itself and its document's past."""
    same = sequence_ids[:, :, None] == sequence_ids[:, None, :]
    return same.tril()


def causal_mask(queries: Tensor, keys: Tensor) -> Tensor:
    """Indices [b|1, s] and [b|1, c] -> [b|1, s, c] bool: not what comes later."""
    return keys[:, None, :] <= queries[:, :, None]


def window_mask(queries: Tensor, keys: Tensor, window: int) -> Tensor:
    """Indices [b|1, s] and [b|1, c] -> [b|1, s, c] bool: itself and the window - 1 before it."""
    return queries[:, :, None] - keys[:, None, :] < window


def chunk_mask(queries: Tensor, keys: Tensor, chunk: int) -> Tensor:
    """Positions [b|1, s] and [b|1, c] -> [b|1, s, c] bool: those of the same run of ``chunk``."""
    return _chunk(queries, chunk)[:, :, None] == _chunk(keys, chunk)[:, None, :]


def _chunk(positions: Tensor, chunk: int) -> Tensor:
    return torch.div(positions, chunk, rounding_mode="floor")
