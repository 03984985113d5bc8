"""On a real GPU a step runs where every wait of the host for the device is an error."""

import pytest
import torch
from helpers_no_sync import Trainer
from helpers_train import config, ready_to_train

from moe_builders.parallel.world import open_world

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LOW_BIT = "moe_builders.training.low_bit."
CASES = {
    "bf16 weights": {"param_dtype": "bf16", "optimizer": {"_component_": f"{LOW_BIT}AdamW"}},
    "8 bits": {"param_dtype": "bf16", "optimizer": {"_component_": f"{LOW_BIT}AdamW8bit"}},
    "fp32 weights, fused": {"optimizer": {"_component_": "torch.optim.AdamW", "fused": True}},
    "packed": {"dataset__packed": True, "dataset__split_across_pack": True},
    "recomputed": {"enable_activation_checkpointing": True},
    "selective": {"enable_activation_checkpointing": True, "ac_mode": "selective"},
    "compiled": {"compile": True, "pad_to_multiple_of": 32},
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_for_nothing(name, tmp_path):
    """bf16, where torch's grouped product has a kernel; what is made once is made before."""
    cfg = config(tmp_path, **({"device": "cuda", "compute_dtype": "bf16"} | CASES[name]))
    with open_world(device="cuda") as world:
        model, loader, optimizer, stepper = ready_to_train(cfg, world)
        trainer = Trainer(cfg, world, model, optimizer, stepper)
        steps = loader.steps(epochs=1)
        for _ in range(3):  # states, compilations, buffers of the allocator
            trainer.step(next(steps))
        batches = [next(steps) for _ in range(2)]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in batches:
                trainer.step(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        trainer.reporter.flush()
        trainer.reporter.close()
    losses = [values["loss"] for values in trainer.reporter.history]
    assert len(losses) == 5
    assert torch.tensor(losses).isfinite().all()


def test_a_wait_would_be_an_error():
    """The control: the mode that the test relies on sees a value that is read."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(3, device="cuda").sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
