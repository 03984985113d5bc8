"""Activations kept elsewhere: the wiring with a stand-in, since the copies need a GPU."""

import moe_full_finetune as recipe
import pytest
import torch
from helpers_train import NoTokenizer, config
from torch.autograd.graph import saved_tensors_hooks

from moe_builders.errors import InputError
from moe_builders.parallel.sharding import local_shard
from moe_builders.parallel.world import open_world
from moe_builders.training import offloading
from moe_builders.training.offloading import activation_offloading, require_gpu

BOTH = {"enable_activation_checkpointing": True, "enable_activation_offloading": True}


class OnTheHost(saved_tensors_hooks):
    """Keeps copies, as torchtune's does on the host; sees what it is given."""

    made: list = []  # noqa: RUF012

    def __init__(self):
        self.kept, self.shapes, self.returned = {}, [], 0
        OnTheHost.made.append(self)

        def pack(tensor):
            self.shapes.append(tuple(tensor.shape))
            self.kept[len(self.shapes)] = tensor.clone()
            return len(self.shapes)

        def unpack(number):
            self.returned += 1
            return self.kept.pop(number)

        super().__init__(pack, unpack)


def _gradients(cfg):
    with open_world(device="cpu") as world:
        torch.manual_seed(0)
        model = recipe.build_model(cfg, world).model
        loader = recipe.build_loader(cfg, world, NoTokenizer(), validation=False)
        step = next(loader.steps(epochs=1))
        recipe.train_step(model, step, cfg, world)
        gradients = [local_shard(p.grad).tensor.clone() for p in model.parameters()]
        recipe.validate(model, [step[0]], world)  # keeps nothing, so there is nothing left behind
        return gradients, step[0].tokens.shape


def test_each_layers_input_goes_away_and_comes_back(tmp_path, monkeypatch):
    plain, _ = _gradients(config(tmp_path, enable_activation_checkpointing=True))
    monkeypatch.setattr(offloading, "OffloadActivations", OnTheHost)
    OnTheHost.made.clear()
    moved, (b, s) = _gradients(config(tmp_path, gradient_accumulation_steps=1, **BOTH))
    assert all(map(torch.equal, plain, moved))
    (stand_in,) = OnTheHost.made
    assert [shape for shape in stand_in.shapes if len(shape) == 3] == [(b, s, 64)] * 2
    assert stand_in.returned >= 2
    assert not stand_in.kept, "torchtune checks this before every forward"


def test_off_is_nothing(monkeypatch):
    monkeypatch.setattr(offloading, "OffloadActivations", OnTheHost)
    OnTheHost.made.clear()
    with activation_offloading(False):
        pass
    assert not OnTheHost.made


def test_it_is_torchtunes():
    from torchtune.training import OffloadActivations

    assert offloading.OffloadActivations is OffloadActivations


@pytest.mark.parametrize("key", ["offload_optimizer", "enable_activation_offloading"])
def test_both_need_a_gpu(tmp_path, key):
    message = f"^{key} moves what lies on a GPU .* but device is cpu: set {key}=false"
    changes = {"enable_activation_checkpointing": True, key: True}
    with pytest.raises(InputError, match=message) as caught:
        recipe.main(config(tmp_path / "out", **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    require_gpu(torch.device("cuda"), **{key: True})
    require_gpu(torch.device("cpu"), **{key: False})


def test_offloading_without_checkpointing_is_refused(tmp_path):
    with pytest.raises(InputError, match="set enable_activation_checkpointing=true too"):
        config(tmp_path, enable_activation_offloading=True)
