"""Everything that training changes in model and optimizer, as named tensors and plain numbers.

Names are ``model.<parameter or buffer>`` and ``optimizer.<parameter>.<entry>``, whatever groups the
optimizer keeps them in; what is stored of a quantised entry says ``state_parts``.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moe_builders.checkpoint.run_checkpoints import Checkpoint
from moe_builders.checkpoint.state_parts import Entry, StoredParts
from moe_builders.errors import InputError
from moe_builders.parallel.agree import gather_objects, raise_together
from moe_builders.parallel.dcp import stored_tensors
from moe_builders.parallel.sharding import local_shard
from moe_builders.training.stepping import Stepper

_LISTED = 5  # names shown of each kind of difference


class TrainingState:
    """A model and its optimizer, to be taken apart and put together again.

    Args:
        model: sharded or not, on its device.
        stepper: of its optimizer, before the first step; only what changes afterwards is state,
            and hyperparameters stay the configuration's.
    """

    def __init__(self, model: nn.Module, stepper: Stepper) -> None:
        self.model, self.stepper, self.optimizer = model, stepper, stepper.optimizer
        # now: a forward may leave a layer gathered, and then the model names other objects
        self._named = dict(model.named_parameters())
        self._at_first = [_plain_options(group) for group in self.optimizer.param_groups]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, sharded ones as they are: no copies."""
        self.stepper.wait()
        found = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for entry in self._entries():
            found |= entry.tensors()
        return {name: tensor.detach() for name, tensor in found.items()}

    def numbers(self) -> dict[str, Any]:
        """JSON: the optimizer's entries that are no tensors, and options that it has changed."""
        entries = {
            name: {key: value for key, value in state.items() if not isinstance(value, Tensor)}
            for name, _, state in self._states()
        }
        changed = [
            {key: value for key, value in _plain_options(group).items() if first.get(key) != value}
            for group, first in zip(self.optimizer.param_groups, self._at_first, strict=True)
        ]
        return {
            "optimizer": type(self.optimizer).__name__,
            "entries": {name: values for name, values in entries.items() if values},
            "options": changed,
        }

    def check_finite(self, step: int) -> None:
        """Look at the weights before they are saved; every process calls.

        Raises:
            InputError: one holds NaN or infinity; on every process.
        """
        error = None
        for name, parameter in self._named.items():
            if not local_shard(parameter.detach()).tensor.isfinite().all():
                error = InputError(
                    f"{name} is not finite after step {step}: training has diverged and nothing is "
                    "saved; lower the learning rate, or look at the data of that step"
                )
                break
        raise_together(error)

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint, numbers: Mapping[str, Any]) -> list[str]:
        """Take over a checkpoint's tensors and numbers; every process calls.

        Returns:
            Sentences on what is not bit for bit what was saved.

        Raises:
            InputError: another model or optimizer was saved; the differences are listed.
        """
        stored = stored_tensors(checkpoint.folder)
        name = type(self.optimizer).__name__
        if numbers["optimizer"] != name:
            raise InputError(
                f"{checkpoint.folder} holds the state of {numbers['optimizer']}, which {name} "
                "cannot go on with: set optimizer back, or start over with resume=never"
            )
        self._make_entries(stored)
        tensors, parts = self.tensors(), StoredParts(stored)
        refilled = self._to_refill(parts)
        for entry in refilled:
            for part in entry.tensors():
                tensors.pop(part)
            stored = {n: s for n, s in stored.items() if n not in parts.names(entry.name)}
        problem = _differences(tensors, stored)
        error = None
        if problem is not None:
            saved_by = checkpoint.facts.get("processes", "?")
            error = InputError(
                f"{checkpoint.folder} does not fit this run: {problem}; go on with the model, "
                f"optimizer, dtypes and number of processes ({saved_by}) it was saved with, or "
                "start over with resume=never"
            )
        raise_together(error)
        checkpoint.read(tensors)
        rounded = [entry.name for entry in refilled if parts.refill(entry, checkpoint.read)]
        for group, options in zip(self.optimizer.param_groups, numbers["options"], strict=False):
            group.update(options)
        by_name = {name: state for name, _, state in self._states()}
        for name, values in numbers["entries"].items():
            by_name[name].update(values)
        rounded = sorted(set().union(*gather_objects(rounded)))
        if not rounded:
            return []
        return [
            f"{len(rounded)} optimizer states are quantised anew, which rounds them, since other "
            f"processes hold other blocks of them ({', '.join(rounded[:_LISTED])}"
            f"{', …' if len(rounded) > _LISTED else ''})"
        ]

    def _to_refill(self, parts: StoredParts) -> list[Entry]:
        """Entries that were saved by other processes in other parts: the same on every process."""
        entries = {entry.name: entry for entry in self._entries()}
        own = [
            entry.name
            for entry in entries.values()
            if not entry.tensors().keys() <= parts.names(entry.name) and parts.can_refill(entry)
        ]
        wanted = set().union(*gather_objects(own))
        return [entry for name, entry in entries.items() if name in wanted]

    def _entries(self) -> Iterator[Entry]:
        for name, parameter, state in self._states():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    yield Entry(f"optimizer.{name}.{key}", value, parameter)

    def _states(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        for name, parameter in self._named.items():
            if parameter in self.optimizer.state:
                yield name, parameter, self.optimizer.state[parameter]

    def _make_entries(self, stored: Mapping[str, Any]) -> None:
        """Entries for the parameters that had some in the run that saved; their values are moot."""
        owners = {name.removeprefix("optimizer.") for name in stored if "optimizer." in name}
        self.stepper.make_states(
            parameter
            for name, parameter in self._named.items()
            if parameter.requires_grad and any(owner.startswith(f"{name}.") for owner in owners)
        )


def _plain_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's numbers and switches; the rate is left out, since the schedule gives it."""
    return {
        key: value
        for key, value in group.items()
        if isinstance(value, (int, float, bool)) and key not in ("lr", "initial_lr")
    }


def _differences(tensors: Mapping[str, Tensor], stored: Mapping[str, Any]) -> str | None:
    # a process has only its own parts of what is taken apart
    own = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    missing = [name for name in own if name not in stored]
    surplus = [name for name in stored if name not in own and not name.endswith("]")]
    other = [
        f"{name} is {_shown(own[name])}, was {_shown(stored[name])}"
        for name in own
        if name in stored and own[name] != stored[name]
    ]
    kinds = {"not in the checkpoint": missing, "only in the checkpoint": surplus}
    kinds |= {"of another shape or dtype": other}
    found = [
        f"{len(names)} {kind} ({', '.join(names[:_LISTED])}{', …' if len(names) > _LISTED else ''})"
        for kind, names in kinds.items()
        if names
    ]
    return "; ".join(found) or None


def _shown(entry: tuple[tuple[int, ...], torch.dtype]) -> str:
    shape, dtype = entry
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
