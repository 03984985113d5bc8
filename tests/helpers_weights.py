"""Parameters without a model, boxes of them for processes that are not there, and real ranks."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from moe_builders.checkpoint import stream
from moe_builders.checkpoint.folder import SINGLE_NAME, TensorFolder
from moe_builders.checkpoint.taking import take_pieces
from moe_builders.parallel.sharding import LocalShard, shard_model
from moe_builders.parallel.world import open_world
from moe_builders.pieces import Piece
from moe_builders.weights import Row, make_plan

Boxes = Mapping[str, Sequence[tuple[slice, ...]]]


class Parameters(nn.Module):
    """Parameters of given shapes and dotted names."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            *path, last = name.split(".")
            module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, nn.Parameter(torch.full(shape, float("nan"))))


def cut(shape: tuple[int, ...], dice: random.Random) -> list[tuple[slice, ...]]:
    """A grid of boxes that make up a shape, cut at random; some may be empty."""
    boxes: list[tuple[slice, ...]] = [()]
    for size in shape:
        ends = sorted(dice.choices(range(size + 1), k=dice.randrange(3)))
        edges = zip([0, *ends], [*ends, size], strict=True)
        steps = [slice(a, b) for a, b in edges]
        boxes = [(*box, step) for box in boxes for step in steps]
    return boxes


def load_in_boxes(
    model: nn.Module, plan: Sequence[Piece], folder: TensorFolder, boxes: Boxes
) -> None:
    """Load one process after the other: number n holds box n of each parameter, or the first."""
    for number in range(max(map(len, boxes.values()))):
        held = {
            tensor.data_ptr(): boxes[name][number % len(boxes[name])]
            for name, tensor in model.state_dict().items()
        }

        def local_shard(tensor: Tensor, held=held) -> LocalShard:
            box = held[tensor.data_ptr()]
            return LocalShard(tensor[box], tuple(step.start for step in box))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stream, "local_shard", local_shard)
            stream.load_pieces(model, plan, folder)


class Recorder(TensorFolder):
    """Keeps (name, bytes) of every read."""

    reads: list[tuple[str, int]]

    def read(self, name: str, region: tuple[slice, ...]) -> Tensor:
        value = super().read(name, region)
        self.reads.append((name, value.numel() * value.element_size()))
        return value


@contextmanager
def count_received() -> Iterator[list[int]]:
    """Bytes of each message that comes in, point to point, while inside."""
    received: list[int] = []
    exchange = torch.distributed.batch_isend_irecv

    def counted(operations: list[torch.distributed.P2POp]) -> list[torch.distributed.Work]:
        assert all(op.tensor.dtype is torch.uint8 for op in operations)  # what any backend sends
        coming = (op for op in operations if op.op is torch.distributed.irecv)
        received.extend(op.tensor.nbytes for op in coming)
        return exchange(operations)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "batch_isend_irecv", counted)
        yield received


def there_and_back(
    rows: tuple[Row, ...], shapes: dict[str, tuple[int, ...]], path: str
) -> dict[str, object]:
    """On each rank: load a folder into shards and take it out again; what went wrong, and sizes.

    Returns:
        The parameters put together again; names on disk whose bits changed; bytes read, held and
        received by all ranks together.
    """
    with open_world(device="cpu") as world:
        with torch.device("meta"):
            model = Parameters(shapes)
        shard_model(model, world, compute_dtype=torch.float32, reshard_after_forward=True)
        plan, folder = make_plan(rows, stream.model_shapes(model)), Recorder(path)
        folder.reads = []
        stream.check_complete(plan, folder.entries, path)
        stream.materialize(model, "cpu")
        stream.load_pieces(model, plan, folder)
        state = model.state_dict()
        held = sum(tensor.to_local().numel() for tensor in state.values())
        sums = torch.tensor([sum(size for _, size in folder.reads), 4 * held])
        torch.distributed.all_reduce(sums)
        stored = load_file(Path(path) / SINGLE_NAME)
        dtypes = {name: tensor.dtype for name, tensor in stored.items()}
        dealt = [list(stored)[rank :: world.size] for rank in range(world.size)]
        with count_received() as received:
            taken = take_pieces(model, plan, dtypes, rank=world.rank)(dealt)
        assert list(taken) == dealt[world.rank]
        changed = [name for name in taken if not torch.equal(taken[name], stored[name])]
        everybody = world.gather_objects((list(taken), changed, sum(received)))
        names, wrong, sizes = zip(*everybody, strict=True)
        return {
            "whole": {name: tensor.full_tensor().detach() for name, tensor in state.items()},
            "taken": [name for each in names for name in each],
            "changed": [name for each in wrong for name in each],
            "read": int(sums[0]),
            "held": int(sums[1]),
            "received": sum(sizes),
        }
