"""A step reads no value of the device on the host: it runs on tensors that have none."""

from dataclasses import replace

import moe_full_finetune as recipe
import pytest
import torch
from helpers_no_sync import NoWaitingCopies, OnTheWayFromNowhere, Trainer
from helpers_train import NoTokenizer, config

from moe_builders.moe import moe_layers
from moe_builders.parallel.grad_norm import GradNorm
from moe_builders.parallel.world import open_world
from moe_builders.training import reporting
from moe_builders.training.optimizer import build_optimizer
from moe_builders.training.stepping import build_stepper

ROUTERS = "moe_builders.routers."
GENERIC = {
    "model": {
        "_component_": "moe_builders.generic.moe_transformer", "vocab_size": 64, "embed_dim": 32,
        "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "num_experts": 8,
        "experts_per_token": 2, "expert_hidden_dim": 16, "max_seq_len": 64, "expert_bias": True,
    },
    "expert_bias__update_rate": 0.001,
}  # fmt: skip
COSINE = {"_component_": "torchtune.training.get_cosine_schedule_with_warmup",
          "num_warmup_steps": 2}  # fmt: skip
ADAMW, LOW_BIT = "torch.optim.AdamW", "moe_builders.training.low_bit."
CASES = {
    "plain": {},
    "packed": {"dataset__packed": True, "dataset__split_across_pack": True},
    "accumulated, scheduled": {"gradient_accumulation_steps": 2, "lr_scheduler": COSINE},
    "no clipping": {"clip_grad_norm": None},
    "foreach": {"optimizer": {"_component_": ADAMW, "foreach": True}},
    "8 bits": {"optimizer": {"_component_": f"{LOW_BIT}AdamW8bit"}},
    "bf16 weights": {"optimizer": {"_component_": f"{LOW_BIT}AdamW"}, "param_dtype": "bf16"},
    "in backward": {"optimizer_in_bwd": True, "clip_grad_norm": None},
    "recomputed": {"enable_activation_checkpointing": True},
    "selective": {"enable_activation_checkpointing": True, "ac_mode": "selective"},
    "bias learns": GENERIC,
    "bias learns, quantile": GENERIC
    | {"expert_bias__rule": "quantile", "model__score_function": "sigmoid"},
    "global balance": {"router_losses__load_balancing_scope": "global"},
    "counted first": {"router_losses__load_balancing_scope": "global",
                      "router_losses__global_exact": True},
    "labels alone": {"router_losses__mask": "labels"},
    "capacity": {"routing__capacity_factor": 1.0, "routing__drop": "probs"},
    "padded capacity": {"routing__capacity_factor": 1.0, "routing__capacity_scope": "micro",
                        "routing__pad_to_capacity": True},
    "jitter": {"routing__jitter": "gumbel", "routing__jitter_scale": 0.1},
}  # fmt: skip
OTHER_ROUTERS = {
    "expert choice": {"_component_": f"{ROUTERS}ExpertChoiceTopKRouter",
                      "inference": "threshold_ema"},
    "expert choice, documents": {"_component_": f"{ROUTERS}ExpertChoiceTopKRouter",
                                 "scope": "sequence", "inference": "bce",
                                 "max_experts_per_token": 3},
    "threshold": {"_component_": f"{ROUTERS}ThresholdRouter"},
    "coordinate descent": {"_component_": f"{ROUTERS}CoordinateDescentRouter"},
    "sinkhorn": {"_component_": f"{ROUTERS}SinkhornRouter"},
    "sinkhorn, documents": {"_component_": f"{ROUTERS}SinkhornRouter", "per_sequence": True},
    "hash": {"_component_": f"{ROUTERS}HashRouter"},
    "forced balance": {"_component_": f"{ROUTERS}ForcedBalanceRouter", "noise": 0.5},
}  # fmt: skip
CASES |= {
    name: {"router": router, "router_losses__load_balancing_coef": 0.0}
    for name, router in OTHER_ROUTERS.items()
}


def two_steps(cfg, monkeypatch, spoil=lambda model: None):
    """Two, so that the second one's hand-over shows the first one's values."""
    monkeypatch.setattr(reporting, "OnTheWay", OnTheWayFromNowhere)
    # FSDP2, which casts, does not run without values
    monkeypatch.setattr(recipe, "needs_sharding", lambda *_, **__: False)
    with open_world(device="cpu") as world:
        loader = recipe.build_loader(cfg, world, NoTokenizer(), validation=False)
        steps = loader.steps(epochs=1)
        batches = [next(steps), next(steps)]
        model = recipe.build_model(cfg, world).model.to("meta")
        spoil(model)
        world = replace(world, device=torch.device("meta"))
        optimizer = build_optimizer(cfg.optimizer, model, param_groups=cfg.param_groups)
        stepper = build_stepper(
            optimizer, GradNorm(), world.device, in_backward=cfg.optimizer_in_bwd, offload=False
        )
        trainer = Trainer(cfg, world, model, optimizer, stepper)
        stepper.make_states()  # once a run they may take numbers along (torchao's do)
        with NoWaitingCopies(), torch.compiler.set_stance("force_eager"):
            for step in batches:
                trainer.step(step)
        trainer.reporter.flush()
        trainer.reporter.close()
    return trainer


@pytest.mark.parametrize("name", CASES)
def test_a_step_reads_nothing(name, monkeypatch, tmp_path):
    trainer = two_steps(config(tmp_path, **CASES[name]), monkeypatch)
    assert len(trainer.reporter.history) == 2
    states = [s for state in trainer.optimizer.state.values() for s in state.values() if s.ndim]
    assert states
    assert all(s.is_meta for s in states)


def _item(routing):
    routing.weights.sum().item()


def _choose(routing):
    return routing.weights[routing.weights > 0]


def _ask(routing):
    assert (routing.weights >= 0).all()


def _fetch(routing):
    torch.tensor([1, 2], device=routing.weights.device)


@pytest.mark.parametrize("read", [_item, _choose, _ask, _fetch])
def test_a_read_is_seen(read, monkeypatch, tmp_path):
    """The control: a router that looks at its answer."""

    def spoil(model):
        for _, layer in moe_layers(model):
            layer.router.register_forward_hook(lambda _, given, routing: read(routing) and None)

    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        two_steps(config(tmp_path), monkeypatch, spoil)
