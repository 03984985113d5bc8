"""What processes are told that were given one configuration, or several."""

import torch.distributed as dist

from moe_builders.errors import InputError
from moe_builders.parallel.world import open_world

OWN = {
    "same": {},
    "rate": {"optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.5}},
    "seed": {"seed": 1},
    "ep": {"ep": 2},
    "more": {"router_losses": {"z_coef": 0.1}},
}


def sentences(name):
    settings = {"seed": 0, "ep": 1, "optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.1}}
    if dist.get_rank() == 1:
        settings |= OWN[name]
    sentence = None
    try:
        with open_world(device="cpu", ep=settings["ep"], settings=settings) as world:
            assert world.shape.size == 2
    except InputError as error:
        sentence = str(error)
    found = [None] * 2
    dist.all_gather_object(found, sentence)
    return found
