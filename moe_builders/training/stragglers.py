"""Which process is slow by itself, so that all others wait for it: told when it lasts.

Letters: size processes.
"""

from torch import Tensor

_PARTS = ("fetch its data", "update its weights")  # columns of what processes have measured


class Stragglers:
    """Judges the seconds that processes took for what is their own, step by step.

    A process is slow in a step if it took more than ``factor`` times the median of all and
    ``seconds`` more than it. (With an even number the lower median: with two processes the other.)

    Args:
        steps: in a row that it must be slow, or not, before anything is said.
        factor, seconds: see above [1, s].
    """

    def __init__(self, *, steps: int = 5, factor: float = 2.0, seconds: float = 0.05) -> None:
        self.steps, self.factor, self.seconds = steps, factor, seconds
        self._in_a_row: dict[tuple[int, int], int] = {}  # (rank, part): steps otherwise than told
        self._told: set[tuple[int, int]] = set()

    def see(self, number: int, own: Tensor) -> list[str]:
        """Sentences to say after a step: of who became slow, and who is no longer.

        Args:
            number: of the step.
            own: [size, 2] seconds of each process: fetching data, updating weights; on the host.
        """
        medians = own.median(dim=0).values  # [2]; the lower one
        slow = (own > self.factor * medians) & (own > medians + self.seconds)  # [size, 2]
        said = []
        for rank, parts in enumerate(slow.tolist()):
            for part, is_slow in enumerate(parts):
                place = rank, part
                if is_slow == (place in self._told):
                    self._in_a_row[place] = 0
                    continue
                self._in_a_row[place] = self._in_a_row.get(place, 0) + 1
                if self._in_a_row[place] < self.steps:
                    continue
                self._in_a_row[place] = 0
                self._told ^= {place}
                state = "slow" if is_slow else "no longer slow"
                said.append(
                    f"rank {rank} is {state}: in step {number}, as in the {self.steps - 1} before, "
                    f"it took {float(own[place]):.3f} s to {_PARTS[part]} (the median process: "
                    f"{float(medians[part]):.3f} s)"
                )
        return said


def lag(own: Tensor) -> dict[str, float]:
    """Which process was slowest in a step [rank], and by how much more than the median one [s].

    Args:
        own: as above.
    """
    total = own.sum(dim=1)  # [size]
    return {
        "slowest_rank": float(total.argmax()),
        "slowest_lag_seconds": float(total.max() - total.median()),
    }
