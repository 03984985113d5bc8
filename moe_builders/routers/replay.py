"""Router replay: the selection of one forward, recorded and used again in another.

Letters: t tokens · k experts_per_token.

Reinforcement learning needs it: an engine that generated a text rounds differently from the model
that is trained on it, and a token near the border between two experts would go elsewhere.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe_builders.errors import InputError


class ReplaySlot:
    """Where a router's selection passes through; idle unless a ``RouterReplay`` uses it.

    A copy of a model has idle slots of its own.

    Attributes:
        mode: "record" keeps the last call's selection, "replay" puts the target in its place,
            "ended": a replay is over, "idle".
        recorded: [t, k] or None.
        target: [t, k] or None.
    """

    def __init__(self) -> None:
        self.mode: Literal["idle", "record", "replay", "ended"] = "idle"
        self.recorded: Tensor | None = None
        self.target: Tensor | None = None

    def __deepcopy__(self, memo: dict) -> "ReplaySlot":
        return ReplaySlot()

    def __call__(self, expert: Tensor) -> Tensor:
        """[t, k] -> [t, k], the experts to use.

        Raises:
            RuntimeError: replaying without a target, or a recomputation of a replayed forward that
                keeps no decisions, after the replay has ended: it would select anew.
            InputError: the target has another shape.
        """
        if self.mode == "record":
            self.recorded = expert.detach()
        elif self.mode == "replay":
            return self._replayed(expert)
        elif self.mode == "ended":
            # no public name tells that backward is running; torch.utils.checkpoint asks this, too
            if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
                raise RuntimeError(
                    "a replayed forward is recomputed after its replay has ended: call backward "
                    "inside `with replay.replay(...)`, too"
                )
            self.mode = "idle"
        return expert

    def _replayed(self, expert: Tensor) -> Tensor:
        if self.target is None:
            raise RuntimeError("a router is to replay, but has no target: it was cleared")
        if self.target.shape != expert.shape:
            raise InputError(
                f"the selection to replay is {list(self.target.shape)}, but the router selects "
                f"{list(expert.shape)}: replay the same tokens"
            )
        return self.target


class RouterReplay:
    """Records and replays the selections of a model's routers.

    Only the selection is replayed: weights, losses and their gradients come from the present
    scores, so that the router still learns. Our decoder's activation checkpointing takes over the
    forward's selection; with another one's, backward belongs inside the ``with`` as well.

    Args:
        model: its routers with a ``ReplaySlot`` named ``replay`` are meant, in the order in which
            ``model.modules()`` names them, which is that of construction.

    Raises:
        InputError: there is none.

    Example::

        replay = RouterReplay(model)
        with replay.record():
            model(tokens)
        selections = replay.collect()
        with replay.replay(selections):
            loss(model(tokens)).backward()
    """

    def __init__(self, model: nn.Module) -> None:
        # vars, not getattr: a compiled module answers for the one inside it
        found = {
            name: (module, slot)
            for name, module in model.named_modules()
            if isinstance(slot := vars(module).get("replay"), ReplaySlot)
        }
        if not found:
            raise InputError("the model has no router whose selection could be replayed")
        self._routers = {name: module for name, (module, _) in found.items()}
        self._slots = {name: slot for name, (_, slot) in found.items()}

    @contextmanager
    def record(self) -> Iterator[None]:
        """Keep what each router selects; of several forwards, the last one's."""
        self._check_idle()
        self._set_mode("record")
        try:
            yield
        finally:
            self._set_mode("idle")

    @contextmanager
    def replay(self, targets: Sequence[Tensor] | None = None) -> Iterator[None]:
        """Let each router select what it is told.

        Args:
            targets: a [t, k] int each, in the order of ``collect``; None: what was recorded. They
                are read on the host once, here.

        Raises:
            RuntimeError: nothing is given and nothing was recorded, or inside of another ``with``.
            InputError: another number of them, or one that is no selection.
        """
        self._check_idle()
        if targets is None:
            targets = self.collect()
        if len(targets) != len(self._slots):
            raise InputError(
                f"there are {len(targets)} selections to replay, but {len(self._slots)} routers: "
                "give one for each"
            )
        for (name, router), target in zip(self._routers.items(), targets, strict=True):
            _check_selection(name, router, target)
        for (name, slot), target in zip(self._slots.items(), targets, strict=True):
            weight = next(self._routers[name].parameters(), target)
            slot.target = target.to(weight.device, torch.int64)
        self._set_mode("replay")
        try:
            yield
        finally:
            self._set_mode("ended")
            for slot in self._slots.values():
                slot.target = None

    def collect(self) -> list[Tensor]:
        """[t, k] of each router, as recorded.

        Raises:
            RuntimeError: a router has recorded nothing.
        """
        found = []
        for name, slot in self._slots.items():
            if slot.recorded is None:
                raise RuntimeError(
                    f"{name or 'the router'} has recorded nothing: run a forward inside `with "
                    "replay.record()` first"
                )
            found.append(slot.recorded)
        return found

    def clear(self) -> None:
        """Forget what was recorded and what is to be replayed."""
        for slot in self._slots.values():
            slot.recorded = slot.target = None

    def _set_mode(self, mode: Literal["idle", "record", "replay", "ended"]) -> None:
        for slot in self._slots.values():
            slot.mode = mode

    def _check_idle(self) -> None:
        for name, slot in self._slots.items():
            if slot.mode in ("record", "replay"):
                raise RuntimeError(
                    f"{name or 'the router'} is already in `with replay.{slot.mode}()`: one at a "
                    "time"
                )


def _check_selection(name: str, router: Any, target: Tensor) -> None:
    name, e = name or "the router", router.num_experts
    if target.ndim != 2 or target.is_floating_point():
        raise InputError(
            f"the selection to replay in {name} is {list(target.shape)} {target.dtype}, but must "
            "be [t, k] whole numbers"
        )
    if target.numel() == 0:
        return
    low, high = int(target.min()), int(target.max())
    if low < 0 or high >= e:
        raise InputError(
            f"the selection to replay in {name} names expert {low if low < 0 else high}, but its "
            f"experts are 0 to {e - 1}"
        )
    if bool((target.sort(-1).values.diff(dim=-1) == 0).any()):
        raise InputError(f"the selection to replay in {name} gives a token an expert twice")
