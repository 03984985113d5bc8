"""Which position may look at which.

Letters: b batch · s sequence.
"""

from torch import Tensor


def block_causal_mask(sequence_ids: Tensor) -> Tensor:
    """[b, s] document numbers -> [b, s, s] bool: a token sees itself and its document's past."""
    same = sequence_ids[:, :, None] == sequence_ids[:, None, :]
    return same.tril()
