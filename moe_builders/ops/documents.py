"""Where documents end in packed rows: what attention needs to keep them apart, without a mask.

Letters: b rows · s positions · t = b·s tokens · x documents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_builders.ops.masks import block_causal_mask


@dataclass(frozen=True)
class Documents:
    """Runs of tokens that see nothing of each other; a row's padding is one like any other.

    Neither a shape nor a Python number depends on the packing, so that compiled code serves every
    packing; what a kernel asks the host for lies on the host, so that no device is waited for.

    Attributes:
        ends: [t] int32, rising: how many tokens come before the next document; t from the last
            document on. Each row's end is one of them.
        counts: [2] int64 on the host: x, and the tokens of the longest document; None: ``ends`` is
            [x], and the documents have equally many tokens.
    """

    ends: Tensor
    counts: Tensor | None

    def changed(self, change: Callable[[Tensor], Tensor]) -> "Documents":
        """The same documents, what a device needs of them moved or pinned by ``change``."""
        return replace(self, ends=change(self.ends))

    def mask(self, *, rows: int, positions: int) -> Tensor:
        """[b, s, s] bool for attention that knows masks only: a token sees its document's past."""
        numbers = document_of_tokens(self.ends, rows * positions)  # [t]
        return block_causal_mask(numbers.view(rows, positions))

    def positions(self, *, rows: int, positions: int) -> Tensor:
        """[b, s] int64, each token's place in its document."""
        tokens = torch.arange(rows * positions, device=self.ends.device)  # [t]
        begins = torch.cat((self.ends.new_zeros(1), self.ends))  # [x + 1]
        number = document_of_tokens(self.ends, rows * positions)  # [t]
        return (tokens - begins[number]).view(rows, positions)


def documents_of(lengths: Sequence[int]) -> Documents:
    """Documents one after another, from their lengths in tokens, each at least 1."""
    last = torch.tensor(lengths).cumsum(0)  # [x]
    ends = last.new_full((sum(lengths),), sum(lengths), dtype=torch.int32)  # [t]
    ends[: len(lengths)] = last
    return Documents(ends, torch.tensor([len(lengths), max(lengths)]))


def whole_rows(rows: int, positions: int, device: torch.device) -> Documents:
    """Each row one document."""
    return Documents(torch.arange(1, rows + 1, dtype=torch.int32, device=device) * positions, None)


def document_of_tokens(ends: Tensor, num_tokens: int) -> Tensor:
    """[t] int64, the number of each token's document."""
    tokens = torch.arange(num_tokens, dtype=ends.dtype, device=ends.device)  # [t]
    return torch.searchsorted(ends, tokens, right=True)


def runs(
    ends: Tensor, counts: Tensor | None, *, num_tokens: int, chunk: int | None
) -> tuple[Tensor, int]:
    """Ends of what sees nothing of each other, and the most tokens that one of them can have.

    Args:
        ends, counts: of ``Documents``.
        num_tokens: t.
        chunk: each document is cut into runs of this many tokens; None: it is a run.

    Returns:
        [x] or, cut, [x + t // chunk] int32: as many as there can be, so that the host need not
        know; those at the end are of empty runs.
    """
    if counts is None:
        longest = num_tokens // ends.shape[0]
    else:
        num_documents, longest = counts.tolist()
        ends = ends[:num_documents]  # [x]
    if chunk is None or chunk >= longest:
        return ends, longest
    ends = ends.long()
    begins = torch.cat((ends.new_zeros(1), ends[:-1]))  # [x]
    last = torch.cumsum((ends - begins + chunk - 1) // chunk, 0)  # [x] runs up to its end
    run = torch.arange(ends.shape[0] + num_tokens // chunk, device=ends.device)
    document = torch.searchsorted(last, run, right=True).clamp(max=ends.shape[0] - 1)
    before = torch.cat((last.new_zeros(1), last[:-1]))[document]
    cut = torch.minimum(begins[document] + (run - before + 1) * chunk, ends[document])
    return cut.int(), chunk
