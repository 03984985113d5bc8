"""What a layer's forward decided by comparing, for its recomputation to take over."""

from collections.abc import Callable
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor

# A compiled layer must be one graph for a forward and its recomputation (what they save is
# matched one by one), so what tells them apart cannot be in the graph: it is found by a number.
_open: WeakValueDictionary[int, "Decisions"] = WeakValueDictionary()
_numbers = count()


class Decisions:
    """The decisions of one forward of a layer.

    A recomputation may round differently (other kernels, another order of sums), and a token near
    the border between two experts would go elsewhere: its gradient would be that of another
    forward, and between processes the numbers of rows would no longer match. What is kept is
    integers and bools, most of which the layer's ``Routing`` holds anyway.

    Made anew for each forward: of two forwards, each has its own.
    """

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}
        self._again = False  # in a recomputation
        self._asked = 0  # decisions of this run so far
        number = next(_numbers)
        self._number = torch.tensor(number, device="cpu")  # a value that no graph is specialised on
        _open[number] = self

    def take(self, choose: Callable[[], Tensor]) -> Tensor:
        """The next decision: made and kept, or, in a recomputation, the one that was made."""
        place = self._asked
        self._asked += 1
        if torch.compiler.is_compiling():
            return _take(choose().detach(), self._number, place)
        if self._again:
            return self._kept[place]
        chosen = self._kept[place] = choose().detach()
        return chosen

    def start_again(self) -> None:
        """A recomputation begins."""
        self._again, self._asked = True, 0

    def end(self) -> None:
        """It is over, maybe early."""
        self._again = False

    def swap(self, chosen: Tensor, place: int) -> Tensor:
        """``take`` of a compiled layer, when it runs."""
        if not self._again:
            self._kept[place] = chosen.contiguous().clone()
        return self._kept[place].clone()  # the graph may write over what it is given


@torch.library.custom_op("moe_builders::decided", mutates_args=())
def _take(chosen: Tensor, number: Tensor, place: int) -> Tensor:
    return _open[int(number)].swap(chosen, place)


@_take.register_fake
def _(chosen: Tensor, number: Tensor, place: int) -> Tensor:
    return torch.empty_like(chosen, memory_format=torch.contiguous_format)
