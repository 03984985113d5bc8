"""A batch and how samples become one: what is real is known from lengths, never from ids.

Letters: b rows · s positions · t = b·s tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_builders.losses import IGNORE_INDEX
from moe_builders.ops.documents import Documents, documents_of
from moe_builders.ops.masks import block_causal_mask
from moe_builders.routing import TokenInfo


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        tokens: [b, s] int64.
        labels: [b, s] int64, the NEXT token to predict at each position; IGNORE_INDEX = none.
        positions: [b, s] int64, restarting with each document.
        sequence_ids: [b, s] int64 in [0, t), one number a document, unique in the batch; a row's
            padding has a number of its own.
        mask: [b, s] bool, True = a real token.
        packed: whether a row may hold several documents.
        num_cut: documents that begin here and were longer than max_seq_len.
        num_lost: tokens of theirs that were left out.
        documents: where they end, in packed rows; None where a row holds one.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    sequence_ids: Tensor
    mask: Tensor
    packed: bool
    num_cut: int = 0
    num_lost: int = 0
    documents: Documents | None = None

    @property
    def num_labels(self) -> int:
        """Labelled tokens (reads the host's tensors: ask before ``to``)."""
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def num_real(self) -> int:
        """Real tokens."""
        return int(self.mask.sum())

    @property
    def attended_pairs(self) -> int:
        """(query, key) pairs of real tokens, Σ n(n+1)/2 over documents of n tokens (on the host).

        A token at position p of its document sees p + 1 keys.
        """
        return int((self.positions + 1)[self.mask].sum())

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; a loader with pin_memory asks for it."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        names = ("tokens", "labels", "positions", "sequence_ids", "mask")
        documents = None if self.documents is None else self.documents.changed(change)
        return replace(
            self, documents=documents, **{name: change(getattr(self, name)) for name in names}
        )

    @property
    def info(self) -> TokenInfo:
        """What routers may know of the t tokens."""
        return TokenInfo(
            mask=self.mask.flatten(),
            sequence_ids=self.sequence_ids.flatten(),
            input_ids=self.tokens.flatten(),
        )

    @property
    def attention_mask(self) -> Tensor | None:
        """[b, s, s] for packed rows; None where causal is enough (padding stands at the end)."""
        return block_causal_mask(self.sequence_ids) if self.packed else None

    def attention_for(self, model: Any) -> Documents | Tensor | None:
        """What ``model`` takes as mask: documents, if it says so; else ``attention_mask``."""
        if getattr(model, "takes_documents", False):
            return self.documents
        return self.attention_mask


def shift_labels(labels: Sequence[int]) -> list[int]:
    """torchtune's labels (the token itself) -> the next token to predict; the last has none."""
    return [*labels[1:], IGNORE_INDEX] if len(labels) else []


def collate(
    samples: Sequence[Mapping[str, Any] | None],
    *,
    pad_id: int,
    packed: bool = False,
    length: int | None = None,
) -> Batch:
    """Pad samples on the right to one length.

    Args:
        samples: each with "tokens", "labels" (already shifted) and "lengths" of its documents, and
            perhaps how many of them were "cut" and how many tokens "lost" (see ``packing``);
            None makes a row of padding (a rank that has run out of validation samples).
        pad_id: written into padding; never looked at again.
        packed: whether rows may hold several documents.
        length: s; None: the longest sample's.
    """
    rows = [sample or {"tokens": [], "labels": [], "lengths": []} for sample in samples]
    s = length or max(1, *(len(row["tokens"]) for row in rows))
    tokens = torch.full((len(rows), s), pad_id)
    labels = torch.full((len(rows), s), IGNORE_INDEX)
    positions = torch.arange(s).repeat(len(rows), 1)
    sequence_ids = torch.zeros(len(rows), s, dtype=torch.int64)
    mask = torch.zeros(len(rows), s, dtype=torch.bool)
    lengths: list[int] = []  # of all documents, each row's padding at its end
    for i, row in enumerate(rows):
        n, start = len(row["tokens"]), 0
        tokens[i, :n] = torch.as_tensor(row["tokens"], dtype=torch.int64)
        labels[i, :n] = torch.as_tensor(row["labels"], dtype=torch.int64)
        mask[i, :n] = True
        for document in (*row["lengths"], s - n):
            if not document:
                continue
            sequence_ids[i, start : start + document] = len(lengths)
            positions[i, start : start + document] = torch.arange(document)
            start += document
            lengths.append(document)
    num_cut, num_lost = (sum(row.get(key, 0) for row in rows) for key in ("cut", "lost"))
    documents = documents_of(lengths) if packed else None
    return Batch(
        tokens, labels, positions, sequence_ids, mask, packed, num_cut, num_lost, documents
    )
