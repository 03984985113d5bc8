"""Where values first stopped being numbers: looked for in every step, read only when needed.

Every place is reduced to one number on the device, which is not finite if anything in it is not.
(It may also overflow where all were finite, which misleads nobody: it is read only when the loss or
the gradient norm is not finite.) The numbers travel to the host with the step's other values, so
that no step waits for them.

Letters: p places.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_OUTPUT = "the output"  # norm, logits and loss


@dataclass(frozen=True)
class Watched:
    """One step as one process saw it.

    Attributes:
        places: p names in the order in which a step comes to them: forward, then backward, then
            the gradients of parameters from the output down.
        sums: [p] one number a place; not finite where something was not.
    """

    places: tuple[str, ...]
    sums: Tensor


class FiniteWatch:
    """Sums what a decoder shows to its ``probe``, and the gradients that come back the same way.

    Forwards without gradients (validation, counting) and recomputations are not looked at. With
    several micro-batches in a step a place counts as bad if it was in any of them.

    Args:
        num_layers: of the decoder.
    """

    def __init__(self, *, num_layers: int) -> None:
        layers = [f"layers.{number}" for number in range(num_layers)]
        self._places = ("tok_embeddings", *layers, _OUTPUT)
        self._sums: dict[str, Tensor] = {}
        self._order = (
            *self._places,
            # what is wrong with the gradient behind a layer was made by the one after it
            *(f"the backward of {place}" for place in reversed(self._places)),
        )

    def __call__(self, place: str, value: Tensor) -> None:
        """See a value of the forward; place is one of tok_embeddings and layers.0, layers.1, …"""
        if not torch.is_grad_enabled():
            return
        self._add(place, value)
        number = self._places.index(place)
        if value.requires_grad and number + 1 < len(self._places):
            after = f"the backward of {self._places[number + 1]}"
            value.register_hook(functools.partial(self._add, after))

    def take(self, parameters: Iterable[tuple[str, Tensor]] = ()) -> Watched:
        """The step's sums, with those of the gradients that are there; the next step starts anew.

        Args:
            parameters: name and parameter, of this process's shards; call it before clipping,
                which spreads one bad gradient over all.
        """
        gradients: dict[str, Tensor] = {}
        for name, parameter in reversed(list(parameters)):
            if (grad := parameter.grad) is not None:
                local: Any = getattr(grad, "to_local", lambda grad=grad: grad)()
                gradients[f"the gradient of {name}"] = local
        seen = [place for place in self._order if place in self._sums]
        sums = [self._sums[place].double() for place in seen]
        if gradients:  # 2-norms: one launch for all on a GPU, and as fast as memory on the CPU
            sums += [norm.double() for norm in torch._foreach_norm(list(gradients.values()))]
        self._sums = {}
        stacked = torch.stack(sums) if sums else torch.zeros(0)
        return Watched((*seen, *gradients), stacked)

    def _add(self, place: str, value: Tensor) -> None:
        value = value.detach()
        total = value.sum(dtype=torch.promote_types(value.dtype, torch.float32))
        # infinity and -infinity make NaN: once bad, a sum stays bad
        self._sums[place] = self._sums[place] + total if place in self._sums else total


def watch_output(model: nn.Module, loss: Tensor) -> None:
    """Show a micro-batch's loss to the watch that is the model's probe, if one is."""
    probe = getattr(model, "probe", None)
    if isinstance(probe, FiniteWatch):
        probe(_OUTPUT, loss)


def first_bad(places: Sequence[str], sums: Sequence[float]) -> tuple[int, str] | None:
    """(number, name) of the first place that is not finite; None where all are."""
    found = zip(places, sums, strict=True)
    return next(((n, name) for n, (name, s) in enumerate(found) if not math.isfinite(s)), None)


def where_it_began(found: Sequence[tuple[int, str] | None]) -> str:
    """ "in layers.1 on rank 2" from what each process found; "" if none did."""
    bad = [place for place in found if place is not None]
    if not bad:
        return ""
    first = min(bad)
    ranks = [str(rank) for rank, place in enumerate(found) if place == first]
    many = "s" if len(ranks) > 1 else ""
    return f"in {first[1]} on rank{many} {', '.join(ranks)}"
