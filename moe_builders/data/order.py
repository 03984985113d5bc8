"""The order of rows: from seed, epoch and numbers alone, so that any process can work it out."""

from collections.abc import Sequence

import torch

_BELOW = 2**63  # what manual_seed can take


def permutation(n: int, *, seed: int, key: Sequence[int]) -> list[int]:
    """The numbers below n in an order that depends on seed and key only.

    Args:
        n: how many.
        seed: of the run.
        key: which of the run's orders (the epoch, the pass over a set, …).
    """
    number = seed
    for part in key:
        number = (number * 1_000_003 + part) % _BELOW
    return torch.randperm(n, generator=torch.Generator().manual_seed(number)).tolist()


class Order:
    """Rows of one set, or of several one after the other, once an epoch.

    Args:
        num_rows: in all.
        seed: of the order.
        shuffle: a new order every epoch; False: as they are.
    """

    def __init__(self, *, num_rows: int, seed: int, shuffle: bool) -> None:
        self.num_rows, self.seed, self.shuffle = num_rows, seed, shuffle

    def epoch(self, number: int) -> list[int]:
        """Row numbers of an epoch."""
        if not self.shuffle:
            return list(range(self.num_rows))
        return permutation(self.num_rows, seed=self.seed, key=[number])


class MixedOrder:
    """Rows of several sets by weight; an epoch has as many rows as all sets together.

    Set i gives the same number of rows to every epoch and walks through itself again and again,
    each time in a new order, across epochs; so no row comes a second time before all of its set
    have come.

    Args:
        lengths: rows of each set; they are numbered through, one set after the other.
        weights: of each set, in any unit.
        seed: of the order.
        shuffle: False: each set as it is, evenly spread over the epoch.
    """

    def __init__(
        self, *, lengths: Sequence[int], weights: Sequence[float], seed: int, shuffle: bool
    ) -> None:
        self.lengths, self.seed, self.shuffle = list(lengths), seed, shuffle
        self.num_rows = sum(lengths)
        self.counts = largest_remainder(weights, self.num_rows)
        self.starts = [sum(self.lengths[:i]) for i in range(len(self.lengths))]

    def epoch(self, number: int) -> list[int]:
        """Row numbers of an epoch."""
        rows: list[int] = []
        for which, count in enumerate(self.counts):
            first = number * count
            rows += self._walk(which, first, first + count)
        if self.shuffle:
            return [rows[at] for at in permutation(len(rows), seed=self.seed, key=[number])]
        places = [(k + 0.5) / count for count in self.counts for k in range(count)]
        return [row for _, row in sorted(zip(places, rows, strict=True), key=lambda pair: pair[0])]

    def _walk(self, which: int, first: int, last: int) -> list[int]:
        """Rows ``first`` to ``last`` of all that a set gives in the whole run."""
        n, rows = self.lengths[which], []
        while first < last:
            number, at = divmod(first, n)
            order = pass_order(n, seed=self.seed, which=which, number=number, shuffle=self.shuffle)
            rows += [self.starts[which] + row for row in order[at : at + last - first]]
            first += min(n - at, last - first)
        return rows


def pass_order(n: int, *, seed: int, which: int, number: int, shuffle: bool) -> list[int]:
    """The order of the ``number``-th pass over set ``which`` of a mixture."""
    return permutation(n, seed=seed, key=[number, which + 1]) if shuffle else list(range(n))


def largest_remainder(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to the weights that add up to total; off by less than 1 each."""
    shares = [weight / sum(weights) * total for weight in weights]
    counts = [int(share) for share in shares]
    by_rest = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
    for i in by_rest[: total - sum(counts)]:
        counts[i] += 1
    return counts
