"""What processes really hold and send, to be compared with the plan."""

import ctypes
import gc
import resource
from dataclasses import replace

import moe_full_finetune as recipe
import torch
from helpers_train import VOCAB, NoTokenizer, ready_to_train
from torch.utils._python_dispatch import TorchDispatchMode

from moe_builders.generic import moe_transformer
from moe_builders.parallel.own_time import OwnTime
from moe_builders.parallel.sharding import local_shard
from moe_builders.parallel.world import open_world
from moe_builders.training.optimizer import build_optimizer

KINDS = {
    "allreduce_": "all_reduce", "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter", "alltoall_base_": "all_to_all",
}  # fmt: skip


LENGTH = 32


class FullDataset:
    """Documents of one length, all labelled: a batch has no padding."""

    def __init__(self, tokenizer, num_samples=80):
        stream = torch.Generator().manual_seed(0)
        rows = torch.randint(0, VOCAB, (num_samples, LENGTH), generator=stream).tolist()
        self.samples = [{"tokens": row, "labels": row} for row in rows]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


class Collectives(TorchDispatchMode):
    """Counts c10d's operations: {(kind, processes of the group): [calls, bytes of the whole]}.

    The whole is the larger of what goes in and what comes out: gathered, scattered, summed. Of an
    all_to_all it is what goes in.
    """

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name.split("::")[1]
            tensors, groups = [], []
            for arg in args:
                found = arg if isinstance(arg, (list, tuple)) else [arg]
                tensors += [a for a in found if isinstance(a, torch.Tensor)]
                groups += [
                    a
                    for a in found
                    if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())
                ]
            size = next(torch.distributed.ProcessGroup.unbox(g).size() for g in groups)
            entry = self.seen.setdefault((KINDS.get(name, name), size), [0, 0])
            entry[0] += 1
            sizes = [t.nbytes for t in tensors]
            entry[1] += sizes[1] if name == "alltoall_base_" else max(sizes)
        return func(*args, **(kwargs or {}))


def held_and_sent(cfg):
    """Local shapes and bytes of every process, and collectives of one step."""
    with open_world(device="cpu", dp_replicate=cfg.dp_replicate, ep=cfg.ep) as world:
        model, loader, optimizer, stepper = ready_to_train(cfg, world)
        step, own_time = next(loader.steps(epochs=1)), OwnTime(world, optimizer)
        with Collectives() as counted:
            recipe.train_step(model, step, cfg, world)
            recipe.update(stepper, None, cfg)
            own_time.take()
        shapes = {n: tuple(local_shard(p).tensor.shape) for n, p in model.named_parameters()}
        held = {name: local_shard(p).tensor.untyped_storage().nbytes()
                for name, p in model.named_parameters()}  # fmt: skip
        found = {"shapes": shapes, "held": held, "seen": counted.seen}
        return {name: world.gather_objects(value) for name, value in found.items()}


def resident():
    """Bytes of this process that are in memory, without what the allocator has not given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def one_big_layer(*, vocab_size, hidden_dim=12288):
    """3 · 4 · 12288 · 1024 numbers in experts: 604 MB in fp32; the rest has 9 MB."""
    return moe_transformer(
        vocab_size=vocab_size, embed_dim=1024, num_layers=1, num_heads=8, num_kv_heads=2,
        head_dim=64, num_experts=4, experts_per_token=2, expert_hidden_dim=hidden_dim,
        max_seq_len=64,
    )  # fmt: skip


def measured_memory(cfg):
    """Resident bytes above those at the start: at rest, in the experts, after backward, at rest."""
    with open_world(device="cpu", ep=cfg.ep) as world:
        one_step(small(cfg), world)  # whatever libraries load and keep
        start, found = resident(), {}
        model = recipe.build_model(cfg, world).model
        found["parameters"] = resident() - start
        (experts,) = [m for n, m in model.named_modules() if n.endswith("mlp.experts")]

        def note(*_):
            found.setdefault("in the experts", resident() - start)

        experts.register_forward_hook(note, prepend=True)  # before FSDP2 lets go of its weights
        loader = recipe.build_loader(cfg, world, NoTokenizer(), validation=False)
        optimizer = build_optimizer(cfg.optimizer, model, param_groups=cfg.param_groups)
        recipe.train_step(model, next(loader.steps(epochs=1)), cfg, world)
        found["with gradients"] = resident() - start
        optimizer.step()
        found["with states"] = resident() - start
        return {"found": world.gather_objects(found)}


def small(cfg):
    return replace(cfg, model={**cfg.model, "hidden_dim": 16})


def one_step(cfg, world):
    model = recipe.build_model(cfg, world).model
    loader = recipe.build_loader(cfg, world, NoTokenizer(), validation=False)
    optimizer = build_optimizer(cfg.optimizer, model, param_groups=cfg.param_groups)
    recipe.train_step(model, next(loader.steps(epochs=1)), cfg, world)
    optimizer.step()
