"""A short run of the recipe for each family, as data, and what is looked at afterwards."""

import traceback
from datetime import timedelta

import moe_full_finetune as recipe
import torch
import torch.distributed as dist
from helpers_parity import all_cases, write_folder
from helpers_train import config
from hf_helpers import rewrite

STEPS = 20
VOCAB = 128  # of every case
BF16_STORED = {
    "param_dtype": "bf16", "compute_dtype": "bf16",
    "optimizer": {"_component_": "moe_builders.training.low_bit.AdamW"},
}  # fmt: skip
# what a family's run has instead of fp32, one micro-batch and nothing recomputed
KEYS = {
    "deepseek_v2": {"enable_activation_checkpointing": True},
    "deepseek_v3": {"enable_activation_checkpointing": True, "gradient_accumulation_steps": 2},
    "glm4_moe": BF16_STORED,
    "glm4_moe_lite": {"optimizer_in_bwd": True, "clip_grad_norm": None},
    "gpt_oss": {"compute_dtype": "bf16", "enable_activation_checkpointing": True},
    "mixtral": {"reshard_after_forward": False},
    "olmoe": {"router_losses__load_balancing_scope": "global", "router_losses__global_exact": True},
    "qwen2_moe": {"router_losses__mask": "labels"},
}
# fields of config.json instead of the case's; 7 experts are shared unevenly by two processes
FIELDS = {
    "deepseek_v3": {"first_k_dense_replace": 1, "num_hidden_layers": 2},
    "gpt_oss": {"num_local_experts": 7},
    "mixtral": {"num_local_experts": 7, "sliding_window": 6},
    "olmoe": {"num_experts": 7},
}


class Phrases:
    """Documents of 4 to 23 tokens; what follows a token is always the same."""

    def __init__(self, tokenizer, num_samples=120):
        stream = torch.Generator().manual_seed(0)
        follows = torch.randperm(16, generator=stream)
        self.samples = []
        for _ in range(num_samples):
            length, token = torch.randint(4, 24, (2,), generator=stream).tolist()
            tokens = [token % 16]
            while len(tokens) < length:
                tokens.append(int(follows[tokens[-1]]))
            self.samples.append({"tokens": tokens, "labels": list(tokens)})

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def write_base(case, folder, **fields):
    """The case's tiny model, with the tensors that the family carries over."""
    write_folder(case, folder, **(FIELDS.get(case.model_type, {}) | fields))
    stream = torch.Generator().manual_seed(1)
    extra = case.extra_tensors.items()
    rewrite(folder, {name: torch.randn(shape, generator=stream) for name, shape in extra})
    return folder


def config_of(model_type, base, output, **changes):
    """The run of a family."""
    keys = {
        "model": None, "base_model": str(base), "max_seq_len": 32, "batch_size": 2,
        "max_steps": STEPS, "epochs": 9,
        "dataset": {"_component_": "helpers_families.Phrases", "packed": True},
        "optimizer": {"_component_": "torch.optim.AdamW"},
    }  # fmt: skip
    keys |= KEYS.get(model_type, {}) | changes
    keys["optimizer"] = {"lr": 5e-3, "weight_decay": 0.0} | keys["optimizer"]
    return config(output, **keys)


def trained(cfg):
    """A whole run: its history, and every process's buffers at the end.

    A run that fails on all processes alike does not take the others with it: its traceback is the
    answer, under "failed".
    """
    models, build = [], recipe.build_model

    def build_and_keep(*args, **options):
        base = build(*args, **options)
        models.append(base.model)
        return base

    recipe.build_model = build_and_keep
    try:
        # torchao compiles its update for each shape: seconds
        with torch.compiler.set_stance("default" if cfg.compile else "force_eager"):
            history = recipe.main(cfg).history
    except Exception:
        if dist.is_initialized():  # a process that fails alone ends all
            dist.monitored_barrier(timeout=timedelta(seconds=30))
        return {"failed": traceback.format_exc()}
    finally:
        recipe.build_model = build
    saved = models[0].state_dict()
    own = {n: b.clone() for n, b in models[0].named_buffers() if n in saved}
    everybody = [own]
    if dist.is_initialized():
        everybody = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, own)
    return {"history": history, "buffers": everybody}


def families():
    """model_type of every family that has a case."""
    return list(all_cases())
