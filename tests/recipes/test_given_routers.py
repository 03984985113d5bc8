"""Sinkhorn, hash and forced balance through the recipe: ids arrive, gates learn or do not."""

import moe_full_finetune as recipe
import pytest
import torch
from helpers_train import VOCAB, config, losses_and_weights

from moe_builders.moe import collect_routing

ROUTERS = "moe_builders.routers."


def of(name, tmp_path, **arguments):
    component = {"_component_": "helpers_given_routers.decoder", "vocab_size": VOCAB,
                 "router": ROUTERS + name} | arguments  # fmt: skip
    return config(
        tmp_path,
        model=component,
        router_losses__load_balancing_coef=0.0,
        router_losses__z_coef=0.0,
        max_steps=4,
    )


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("SinkhornRouter", {"per_sequence": True}),
        ("SinkhornRouter", {"select_only": True}),
        ("HashRouter", {}),
        ("HashRouter", {"table": [[i % 4, (i + 1) % 4] for i in range(VOCAB)]}),
        ("ForcedBalanceRouter", {}),
        ("ForcedBalanceRouter", {"noise": 0.5}),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trains(name, arguments, checkpointing, tmp_path, monkeypatch):
    seen, started = [], {}

    def watch(model):
        found = collect_routing(model)
        seen.extend(found.values())
        return found

    def build(config, world, **rest):
        base = build_model(config, world, **rest)
        started.update({n: p.detach().clone() for n, p in base.model.named_parameters()})
        return base

    build_model = recipe.build_model
    monkeypatch.setattr(recipe, "collect_routing", watch)
    monkeypatch.setattr(recipe, "build_model", build)
    cfg = of(name, tmp_path, **arguments)
    cfg.enable_activation_checkpointing = checkpointing
    result = losses_and_weights(cfg)
    assert len(result["loss"]) == 4
    assert torch.tensor(result["loss"]).isfinite().all()
    gate = "layers.0.mlp.router.gate.weight"
    same = torch.equal(result["weights"][gate], started[gate])
    assert same == (name == "ForcedBalanceRouter")  # its gate is watched, not trained
    assert len(seen) == 8
    for routing in seen:
        mask, counts = routing.info.mask, routing.num_tokens_per_expert
        assert not mask.all()
        assert counts.sum() == 2 * mask.sum()
        if name == "HashRouter":
            factor = 1 if arguments else 2
            first = routing.selected[mask][:, 0]
            assert torch.equal(first, factor * routing.info.input_ids[mask] % 4)
        if name == "ForcedBalanceRouter" and not arguments:
            assert counts.max() - counts.min() <= 1
    if "table" in arguments:
        assert result["weights"]["layers.0.mlp.router.table"].tolist() == arguments["table"]
