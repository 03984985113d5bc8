"""The grid of meshes that must change nothing: its cases, its models, and what is compared.

A case is two clipped AdamW steps on the same 24 samples each, in one way of sharing them out.
"""

import itertools
import random

import moe_full_finetune as recipe
import torch
from helpers_train import VOCAB, config, ready_to_train

from moe_builders.moe import collect_routing
from moe_builders.parallel.sharding import whole_tensor
from moe_builders.parallel.world import open_world

SAMPLES = 24
_COMMON = {
    "vocab_size": VOCAB, "embed_dim": 32, "num_layers": 2, "num_heads": 2, "num_experts": 8,
    "expert_hidden_dim": 16, "shared_hidden_dim": 16, "intermediate_dim": 40, "max_seq_len": 64,
}  # fmt: skip
FAMILIES = {
    "dense first, shared": {
        "_component_": "moe_builders.families.dots1.dots1", **_COMMON, "num_kv_heads": 2,
        "experts_per_token": 2, "num_dense_layers": 1,
    },
    "groups": {
        "_component_": "moe_builders.latent_decoder.latent_moe_decoder", **_COMMON,
        "q_lora_rank": None, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
        "v_head_dim": 8, "experts_per_token": 3, "num_groups": 4, "groups_per_token": 2,
        "dense_layers": [], "route_scale": 2.0,
    },
    # fewer than processes to shard them: over another dim
    "two experts": {
        "_component_": "moe_builders.families.dots1.dots1", **_COMMON, "num_kv_heads": 2,
        "num_experts": 2, "experts_per_token": 1, "normalize_weights": False,
    },
}  # fmt: skip
MESHES = {  # processes, dp_replicate, dp_shard, ep
    "shard 2": (2, 1, 2, 1), "shard 4": (4, 1, 4, 1), "replicate 2, shard 2": (4, 2, 2, 1),
    "ep 2": (2, 1, 1, 2), "ep 4": (4, 1, 1, 4), "shard 2, ep 2": (4, 1, 2, 2),
    "replicate 2, ep 2": (4, 2, 1, 2),
}  # fmt: skip
EIGHT = {
    "replicate 2, shard 2, ep 2": (8, 2, 2, 2), "shard 4, ep 2": (8, 1, 4, 2), "ep 8": (8, 1, 1, 8),
    "shard 8": (8, 1, 8, 1),
}  # fmt: skip
SCOPES = {
    "sequence": {},
    "global_exact": {"router_losses__load_balancing_scope": "global",
                     "router_losses__global_exact": True},
}  # fmt: skip
AXES = {
    "family": list(FAMILIES),
    "mesh": list(MESHES),
    "dispatcher": ["all_to_all", "all_gather"],
    "checkpointing": [False, True],
    "accumulation": [1, 3],
    "scope": list(SCOPES),
}


def all_cases(meshes=MESHES):
    """Every combination; a mesh without ep has no dispatcher to choose."""
    axes = AXES | {"mesh": list(meshes)}
    return [
        case
        for case in itertools.product(*axes.values())
        if ("ep" in case[1] or case[2] == AXES["dispatcher"][0])
        and FAMILIES[case[0]]["num_experts"] % (MESHES | EIGHT)[case[1]][3] == 0
    ]


def pairwise(cases):
    """Few of the cases, in which every two values that occur together do."""

    def pairs(case):
        return set(itertools.combinations(enumerate(case), 2))

    left = set().union(*map(pairs, cases))
    order, chosen = list(cases), []
    random.Random(0).shuffle(order)
    while left:
        best = max(order, key=lambda case: len(pairs(case) & left))
        chosen.append(best)
        left -= pairs(best)
    return chosen


def config_of(case, folder, *, dtype="fp64"):
    """A configuration; ``mesh`` None: one process that takes all samples at once."""
    family, mesh, dispatcher, checkpointing, accumulation, scope = case
    size, replicate, shard, ep = (1, 1, 1, 1) if mesh is None else (MESHES | EIGHT)[mesh]
    return config(
        folder / "run",
        model=FAMILIES[family], dp_replicate=replicate, dp_shard=shard, ep=ep,
        ep_dispatcher=dispatcher, enable_activation_checkpointing=checkpointing,
        gradient_accumulation_steps=accumulation, batch_size=SAMPLES // (size * accumulation),
        param_dtype=dtype, compute_dtype=dtype, clip_grad_norm=0.5,
        expert_bias={"update_rate": 0.01}, **SCOPES[scope],
    )  # fmt: skip


def one_process(case):
    """The case that another one must equal."""
    family, _, dispatcher, _, _, scope = case
    return (family, None, dispatcher, False, 1, scope)


def two_steps(cfg):
    """Values, gradients, margin of the first step; norms; weights and biases after the second."""
    with open_world(device="cpu", dp_replicate=cfg.dp_replicate, dp_shard=cfg.dp_shard,
                    ep=cfg.ep) as world:  # fmt: skip
        model, loader, _, stepper = ready_to_train(cfg, world)
        found, norms = {}, []
        steps = loader.steps(epochs=1)
        for number in range(2):
            values = recipe.train_step(model, next(steps), cfg, world)
            if number == 0:
                found["values"] = {k: v.clone() for k, v in values.items()}
                found["gradients"] = {
                    name: whole_tensor(p.grad).clone() for name, p in model.named_parameters()
                }
                found["margin"] = smallest_margin(model, world)
            norms.append(float(recipe.update(stepper, None, cfg)))
            recipe.teach_routers(model, values["tally"])
        return found | {
            "norms": norms,
            "weights": {n: whole_tensor(p.detach()).clone() for n, p in model.named_parameters()},
            "biases": {n: b.clone() for n, b in model.named_buffers() if n.endswith("expert_bias")},
        }


def smallest_margin(model, world):
    """Between the last expert that was chosen and the first that was not, of all processes."""
    margins = []
    for routing in collect_routing(model).values():
        chosen = torch.zeros_like(routing.probs, dtype=torch.bool)
        chosen.scatter_(1, routing.selected, True)
        scores = routing.logits.detach().sigmoid()
        real = routing.info.mask
        low = scores.masked_fill(~chosen, 9).amin(1)[real]
        high = scores.masked_fill(chosen, -9)
        near = (high - low[:, None] if real is None else high[real] - low[:, None]).abs()
        margins.append(near.min())
    return float(torch.stack(world.gather_objects(torch.stack(margins).min())).min())


class Sequences:
    """Documents that can be learned: the next token follows from the last, most of the time."""

    def __init__(self, tokenizer, num_samples=1600, seed=0):
        stream = torch.Generator().manual_seed(seed)
        self.samples = []
        for _ in range(num_samples):
            length = int(torch.randint(6, 25, (), generator=stream))
            tokens = [int(torch.randint(0, VOCAB, (), generator=stream))]
            for chance in torch.rand(length, generator=stream).tolist():
                last = tokens[-1]
                tokens.append((5 * last + 3) % VOCAB if chance < 0.8 else (last + 7) % VOCAB)
            self.samples.append({"tokens": tokens, "labels": [-100, *tokens[1:]]})

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def learning(folder, *, steps, **changes):
    """A configuration that learns the sequences, with a held-out set; 8 samples a step."""
    data = "helpers_grid.Sequences"
    return config(
        folder, dataset={"_component_": data},
        dataset_val={"_component_": data, "num_samples": 64, "seed": 1},
        model={"_component_": "moe_builders.families.qwen3_moe.qwen3_moe_tiny",
               "vocab_size": VOCAB},
        init_std=0.05, max_steps=steps, log_every_n_steps=1000,
        **{"optimizer": {"_component_": "torch.optim.AdamW", "lr": 3e-3}} | changes,
    )  # fmt: skip


def held_out(cfg):
    """Validation losses before the first and after the last step, and all training losses."""
    with torch.compiler.set_stance("force_eager"):  # torchao's update, which would be compiled
        trained = recipe.main(cfg)
    return {
        "before": trained.validations[0]["val_loss"], "after": trained.validations[-1]["val_loss"],
        "losses": [v["loss"] for v in trained.history],
    }  # fmt: skip
