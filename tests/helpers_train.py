"""Small runs of the real recipe, in this process or on gloo ranks of their own."""

import faulthandler
import gc
import importlib
import multiprocessing
import uuid

import moe_full_finetune as recipe
import torch
import torch.multiprocessing as mp
from omegaconf import OmegaConf

from moe_builders.errors import InputError
from moe_builders.losses import IGNORE_INDEX
from moe_builders.moe import collect_routing, moe_layer
from moe_builders.parallel.grad_norm import GradNorm
from moe_builders.parallel.sharding import local_shard, whole_tensor
from moe_builders.parallel.world import open_world
from moe_builders.training.config import check_config
from moe_builders.training.low_bit import describe_unquantized
from moe_builders.training.optimizer import build_optimizer
from moe_builders.training.stepping import build_stepper

# processes are forked from one that has imported everything: 4 s of a core saved for each
multiprocessing.set_forkserver_preload(["moe_full_finetune", "helpers_train"])
VOCAB = 64
HF_CONFIG = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": VOCAB,
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "moe_intermediate_size": 32, "num_experts": 8,
    "num_experts_per_tok": 2, "norm_topk_prob": True, "max_position_embeddings": 256,
    "rope_theta": 10000.0, "mlp_only_layers": [], "decoder_sparse_step": 1,
    "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "torch_dtype": "float32",
}  # fmt: skip


class RaggedDataset:
    """Documents of unequal length with unequal numbers of labels; one has none at all."""

    def __init__(self, tokenizer, num_samples=80, seed=0):
        stream = torch.Generator().manual_seed(seed)
        self.samples = []
        for number in range(num_samples):
            length = int(torch.randint(3, 25, (), generator=stream))
            tokens = torch.randint(0, VOCAB, (length,), generator=stream)
            share = 0.0 if number == 5 else float(torch.rand((), generator=stream))
            hidden = torch.rand(length, generator=stream) > share
            labels = tokens.masked_fill(hidden, IGNORE_INDEX)
            self.samples.append({"tokens": tokens.tolist(), "labels": labels.tolist()})

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


class NoTokenizer:
    """Enough of a tokenizer for data that is tokens already; pads with a real token's id."""

    pad_id = 3
    max_seq_len = None


def uneven_decoder(*, vocab_size):
    """Dims that two processes do not share evenly: a gate of one row, 3 experts."""
    from helpers_decoder import D, decoder_of

    def mlp(layer):
        return moe_layer(embed_dim=D, expert_hidden_dim=8, num_experts=3, experts_per_token=2,
                         shared_hidden_dim=8, shared_gate=True)  # fmt: skip

    return decoder_of(vocab_size=vocab_size, num_layers=1, mlp=mlp)


def config(output_dir, **changes):
    """A configuration of the recipe for a tiny model, with keys changed by dotted name."""
    values = OmegaConf.create({
        "output_dir": str(output_dir),
        "model": {"_component_": "moe_builders.families.qwen3_moe.qwen3_moe_tiny",
                  "vocab_size": VOCAB},
        "init_std": 0.3,  # wide router margins: rounding flips no choice
        "tokenizer": {"_component_": "helpers_train.NoTokenizer"},
        "dataset": {"_component_": "helpers_train.RaggedDataset"},
        "max_seq_len": 32,
        "batch_size": 4,
        "device": "cpu",
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3},
        "router_losses": {"load_balancing_coef": 0.1, "z_coef": 0.01},
    })  # fmt: skip
    for key, value in changes.items():
        merge = not isinstance(value, list)  # a list takes the place of a component
        OmegaConf.update(values, key.replace("__", "."), value, merge=merge)
    return check_config(values)


def first_step(cfg):
    """Gradients, losses and router margin of the first step, gathered to whole tensors."""
    with open_world(device=cfg.device, dp_replicate=cfg.dp_replicate, ep=cfg.ep) as world:
        torch.manual_seed(cfg.seed)
        model = recipe.build_model(cfg, world).model
        loader = recipe.build_loader(cfg, world, NoTokenizer(), validation=False)
        step = next(loader.steps(epochs=1))
        values = recipe.train_step(model, step, cfg, world)
        gradients = {n: whole_tensor(p.grad).clone() for n, p in model.named_parameters()}
        margins = []
        for routing in collect_routing(model).values():
            top = routing.probs.detach().topk(3).values[routing.info.mask]  # k is 2
            margins.append((top[:, 1] - top[:, 2]).min())
        return {
            "values": {k: v.clone() for k, v in values.items()},
            "gradients": gradients,
            "margin": float(torch.stack(margins).min()),
        }


def draws_after_a_run(cfg):
    """What each process draws next from torch's stream, where none has drawn more than others."""
    recipe.main(cfg)
    found = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, float(torch.rand(())))
    return found


def losses_and_weights(cfg):
    """Losses of every step, and the weights that were saved at the end."""
    from safetensors.torch import load_file

    trained = recipe.main(cfg)
    if not (trained.model_folder / "model.safetensors").exists():
        return {"loss": [v["loss"] for v in trained.history]}
    return {
        "loss": [v["loss"] for v in trained.history],
        "norm": [v["grad_norm"] for v in trained.history],
        "weights": load_file(trained.model_folder / "model.safetensors"),
    }


def ready_to_train(cfg, world):
    """Model, loader, optimizer and stepper as the recipe's ``run`` makes them."""
    torch.manual_seed(cfg.seed)
    model = recipe.build_model(cfg, world).model
    loader = recipe.build_loader(cfg, world, NoTokenizer(), validation=False)
    optimizer = build_optimizer(cfg.optimizer, model, param_groups=cfg.param_groups)
    stepper = build_stepper(
        optimizer, GradNorm(), world.device, in_backward=cfg.optimizer_in_bwd, offload=False
    )
    return model, loader, optimizer, stepper


def learned_buffers(cfg):
    """What routers have learned outside of gradients at a run's end; equal on all processes."""
    found = {}
    with open_world(device=cfg.device) as world:
        model, loader, _, stepper = ready_to_train(cfg, world)
        steps = loader.steps(epochs=cfg.max_steps)
        for _ in range(cfg.max_steps):
            values = recipe.train_step(model, next(steps), cfg, world)
            recipe.update(stepper, None, cfg)
            recipe.teach_routers(model, values["tally"])
        found = {n: b.clone() for n, b in model.named_buffers() if "router" in n and b.numel()}
        everybody = world.gather_objects(found)
    for other in everybody:
        assert all(torch.equal(other[name], value) for name, value in found.items())
    return found


def steps_of(cfg):
    """Weights, state bits and norms after a run's steps, torchao's update run eagerly.

    The local tensors of all processes are compared where they are copies of one shard.
    """
    with open_world(device=cfg.device, dp_replicate=cfg.dp_replicate, ep=cfg.ep) as world:
        with torch.compiler.set_stance("force_eager"):
            model, loader, optimizer, stepper = ready_to_train(cfg, world)
            before = {n: whole_tensor(p.detach()).clone() for n, p in model.named_parameters()}
            norms = []
            steps = loader.steps(epochs=1)
            for _ in range(cfg.max_steps):
                recipe.train_step(model, next(steps), cfg, world)
                norms.append(float(recipe.update(stepper, None, cfg)))
        local = {}
        for name, parameter in model.named_parameters():
            for key, value in {"": parameter, **optimizer.state.get(parameter, {})}.items():
                if value.ndim:
                    wanted = getattr(parameter, "placements", None)  # one process need not shard
                    assert getattr(value, "placements", None) == wanted
                    assert value.shape == parameter.shape
                    local[f"{name} {key}"] = local_shard(value.detach()).tensor
                else:
                    local[f"{name} {key}"] = value
        everybody = [None] * world.size
        torch.distributed.all_gather_object(everybody, {n: bits_of(t) for n, t in local.items()})
        return {
            "before": before,
            "after": {n: whole_tensor(p.detach()).clone() for n, p in model.named_parameters()},
            "norms": norms,
            "states": {n: type(t).__name__ for n, t in local.items()},
            "bits": everybody,
            "unquantized": describe_unquantized(optimizer, model),
        }


def bits_of(tensor):
    """A tensor's plain tensors, as bytes."""
    if hasattr(tensor, "__tensor_flatten__"):
        inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        parts = [part for part in inner if isinstance(part, torch.Tensor)]  # not a mesh
        return [each for part in parts for each in bits_of(part)]
    return [tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()]


def on_ranks(size, cases, folder):
    """Run {name: (function name, arguments…)} on fresh gloo ranks, all in one launch.

    Returns:
        {name: what rank 0 got}; the other ranks' answers must have been equal.
    """
    # they meet at a file: a port that is free now may be taken a moment later
    meeting = f"file://{folder}/{uuid.uuid4().hex}"
    args = size, meeting, cases, str(folder)
    mp.start_processes(_rank, args=args, nprocs=size, start_method="forkserver")
    return torch.load(f"{folder}/ranks{size}.pt", weights_only=False)


def _rank(rank, size, meeting, cases, folder):
    torch.set_num_threads(1)
    faulthandler.enable()  # a rank that dies in C++ says where
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    answers = {name: _find(function)(*args) for name, (function, *args) in cases.items()}
    if rank == 0:
        torch.save(answers, f"{folder}/ranks{size}.pt")
    gc.collect()  # what still holds the group must let go of it before, not at the very end
    torch.distributed.destroy_process_group()


def _find(name):
    """A function of this file, or of another helpers' by its dotted name."""
    module, _, function = name.rpartition(".")
    return getattr(importlib.import_module(module or __name__), function)


def sentence_of(cfg):
    """The InputError of a run, as each process got it."""
    with open_world(device="cpu") as world:
        sentence = None
        try:
            recipe.run(cfg, world)
        except InputError as error:
            sentence = str(error)
        sentences = [None] * world.size
        torch.distributed.all_gather_object(sentences, sentence)
        return sentences
