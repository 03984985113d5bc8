"""The plan of a step is what processes then hold and send; and numbers worked out by hand."""

import functools
from dataclasses import replace

import moe_sharding_plan as shown
import pytest
import torch
from helpers_plan import LENGTH
from helpers_train import config, on_ranks
from torch import nn

from moe_builders.activations import count_activations, layer_bytes
from moe_builders.errors import InputError
from moe_builders.families.deepseek_v3 import deepseek_v3_671b
from moe_builders.families.qwen3_moe import qwen3_moe_tiny
from moe_builders.generic import moe_transformer
from moe_builders.latent_decoder import latent_moe_decoder
from moe_builders.ops.documents import documents_of
from moe_builders.parallel.plan import MeshShape
from moe_builders.parallel.traffic import Collective
from moe_builders.routing import TokenInfo
from moe_builders.step_plan import StepSettings, plan_step

BF16, FP32 = torch.bfloat16, torch.float32
TWO = {
    "plain": {"gradient_accumulation_steps": 2, "router_losses__load_balancing_scope": "global"},
    "uneven": {"model": {"_component_": "helpers_train.uneven_decoder", "vocab_size": 64}},
    "all-to-all": {"ep": 2, "enable_activation_checkpointing": True},
    "all-gather": {"ep": 2, "ep_dispatcher": "all_gather"},
}
MORE = {
    "kept gathered": {"reshard_after_forward": False, "freeze_router": True},
    "counted first": {"router_losses__load_balancing_scope": "global", "ep": 2,
                      "router_losses__global_exact": True, "gradient_accumulation_steps": 2,
                      "enable_activation_checkpointing": True},
    "counted first, apart": {"router_losses__load_balancing_scope": "global",
                             "router_losses__global_exact": True, "ep_dispatcher": "all_gather",
                             "ep": 2},
    "counted first, together": {"router_losses__load_balancing_scope": "global",
                                "router_losses__global_exact": True},
    "recomputed": {"enable_activation_checkpointing": True, "compute_dtype": "bf16"},
    "all-gather, recomputed": {"ep": 2, "ep_dispatcher": "all_gather",
                               "enable_activation_checkpointing": True},
}  # fmt: skip
FOUR = {
    "copies": {"dp_replicate": 2},
    "two of two": {"ep": 2},
    "copies of experts": {"dp_replicate": 2, "ep": 2},
    "bias learns": {"ep": 4, "model": {"_component_": "moe_builders.generic.moe_transformer",
                    "vocab_size": 64, "embed_dim": 16, "num_layers": 2, "num_heads": 2,
                    "num_kv_heads": 1, "head_dim": 8, "num_experts": 4, "experts_per_token": 2,
                    "expert_hidden_dim": 8, "max_seq_len": 64, "expert_bias": True},
                    "expert_bias__update_rate": 0.001},
}  # fmt: skip


def step_config(folder, changes):
    return config(
        folder, max_seq_len=LENGTH, dataset={"_component_": "helpers_plan.FullDataset"}, **changes
    )


def planned(cfg, size):
    """The recipe's own way from a configuration to a plan."""
    return shown.plan_step(shown.build_model(cfg), shown.settings_of(as_plan(cfg, size)))


def as_plan(cfg, size):
    fields = {name: getattr(cfg, name) for name in type(cfg).__dataclass_fields__}
    return shown.PlanConfig(**fields, world_size=size)


def sums(collectives):
    found = {}
    for each in collectives:
        entry = found.setdefault((each.what, each.processes), [0, 0])
        entry[0] += each.calls
        entry[1] += each.whole
    return found


@pytest.mark.parametrize(
    ("size", "cases"),
    [
        (2, TWO),
        pytest.param(2, MORE, marks=pytest.mark.full),
        pytest.param(4, FOUR, marks=pytest.mark.full),
    ],
)
def test_processes_hold_and_send_what_was_planned(size, cases, tmp_path):
    configs = {name: step_config(tmp_path / name, changes) for name, changes in cases.items()}
    found = on_ranks(
        size, {name: ("helpers_plan.held_and_sent", cfg) for name, cfg in configs.items()}, tmp_path
    )
    for name, cfg in configs.items():
        plan, real = planned(cfg, size), found[name]
        for rank in range(size):
            assert {h.name: h.local_shape(rank) for h in plan.held} == real["shapes"][rank], name
            held = {h.name: h.numel * h.dtype.itemsize for h in plan.held}
            assert held == real["held"][rank], name
        # rows go where routers send them: on an average process, what the plan says
        seen = sums([])
        for one in real["seen"]:
            for key, (calls, whole) in one.items():
                entry = seen.setdefault(key, [0, 0])
                entry[0] += calls / size
                entry[1] += whole / size
        assert seen == sums(plan.collectives), name


@pytest.mark.full
@pytest.mark.parametrize("ep", [1, 2])
def test_memory_is_what_was_planned(ep, tmp_path):
    """Parameters, gradients, states and gathered weights of 604 MB of experts, within 5 %."""
    model = {"_component_": "helpers_plan.one_big_layer", "vocab_size": 64}
    cfg = step_config(tmp_path, {"ep": ep, "batch_size": 1, "model": model})
    real = on_ranks(2, {"run": ("helpers_plan.measured_memory", cfg)}, tmp_path)["run"]["found"]
    memory = planned(cfg, 2).memory
    for found in real:
        assert found["parameters"] == pytest.approx(memory.parameters, rel=0.05)
        gathered = found["in the experts"] - found["parameters"]
        wanted = memory.gathered + memory.activations.kept
        assert gathered == pytest.approx(wanted, rel=0.05)
        gradients = found["with gradients"] - found["parameters"]
        assert gradients == pytest.approx(memory.gradients, rel=0.05)
        states = found["with states"] - found["with gradients"]
        assert states == pytest.approx(memory.states, rel=0.05)


class FusedNorm(torch.autograd.Function):
    """What a GPU's norm saves: its input and a number a row."""

    @staticmethod
    def forward(ctx, x, weight):
        scale = (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        ctx.save_for_backward(x, weight, scale.to(x.dtype))
        return (x.float() * scale).to(x.dtype) * weight


def saved_bytes(layer, tokens, *, packed, dtype):
    """Bytes that autograd holds between a layer's forward and backward, its weights apart."""
    layer, s = layer.to(dtype), tokens // 2
    dim = layer.attn.output_proj.out_features
    x = torch.randn(2, s, dim, dtype=dtype, requires_grad=True)
    info = TokenInfo(
        mask=torch.ones(tokens, dtype=torch.bool),
        sequence_ids=torch.arange(2).repeat_interleave(s),
        input_ids=torch.zeros(tokens, dtype=torch.long),
    )
    mask = None
    if packed:
        documents = documents_of([s, s])
        mask = documents if packed == "documents" else documents.mask(rows=2, positions=s)
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x, mask=mask, info=info, input_pos=torch.arange(s).repeat(2, 1))
    return sum(storage.nbytes() for storage in kept.values())


def latent_decoder(v_head_dim=32):
    """Values as wide as keys: a CPU's attention pads them otherwise."""
    return latent_moe_decoder(
        vocab_size=64, embed_dim=64, num_layers=2, num_heads=4, q_lora_rank=24, kv_lora_rank=32,
        qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=v_head_dim, num_experts=8,
        experts_per_token=2, expert_hidden_dim=32, shared_hidden_dim=48, intermediate_dim=96,
        max_seq_len=512,
    )  # fmt: skip


def wide_experts():
    return moe_transformer(
        vocab_size=64, embed_dim=64, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16,
        num_experts=4, experts_per_token=2, expert_hidden_dim=512, max_seq_len=512,
    )  # fmt: skip


def wide_attention():
    return moe_transformer(
        vocab_size=64, embed_dim=64, num_layers=1, num_heads=32, num_kv_heads=16, head_dim=64,
        num_experts=2, experts_per_token=1, expert_hidden_dim=8, max_seq_len=512,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("packed", [None, "mask", "documents"])
def test_layers_save_what_was_planned(packed, dtype, monkeypatch):
    monkeypatch.setattr(nn.RMSNorm, "forward", lambda self, x: FusedNorm.apply(x, self.weight))
    torch.manual_seed(0)
    tokens = 256
    latent = latent_decoder()
    models = (qwen3_moe_tiny(vocab_size=64), latent, wide_experts(), wide_attention())
    for layer in [layer for model in models for layer in model.layers]:
        wanted = saved_bytes(layer, tokens, packed=packed, dtype=dtype)
        mask_len = tokens // 2 if packed == "mask" else 0
        got = tokens * layer_bytes(layer, mask_len=mask_len, compute_dtype=dtype)
        limit = 0.02 if layer in (*models[2].layers, *models[3].layers) else 0.07
        if packed == "documents" and layer in latent.layers:
            limit = 0.14  # its answer is there once: no copy puts the heads side by side
        assert abs(got / wanted - 1) < limit, (type(layer.attn), got, wanted)


def test_selective_keeps_what_was_planned(monkeypatch):
    monkeypatch.setattr(nn.RMSNorm, "forward", lambda self, x: FusedNorm.apply(x, self.weight))
    tokens = 256
    for model in (latent_decoder(), wide_experts(), wide_attention()):
        layer = model.layers[-1]
        forward, model.layers = layer.forward, nn.ModuleList([layer])
        plan = count_activations(
            model, num_tokens=tokens, mask_len=0, compute_dtype=BF16, checkpointing=True,
            ac_mode="selective",
        )  # fmt: skip
        layer.forward = functools.partial(forward, recompute=True)
        wanted = saved_bytes(layer, tokens, packed=False, dtype=BF16)
        row = 2 * model.tok_embeddings.embedding_dim * tokens
        assert abs((plan.kept - 2 * row) / wanted - 1) < 0.07


def test_flops_that_are_computed_again():
    model = latent_decoder()
    plans = [plan_step(model, settings(mesh=MeshShape(1, 1, 1), **changes)) for changes in (
        {"checkpointing": False}, {"ac_mode": "selective"}, {})]  # fmt: skip
    none, some, all_ = (plan.step_flops for plan in plans)
    assert all_ == pytest.approx(none * 4 / 3)
    sizes = {"num_tokens": plans[0].settings.num_tokens, "attended": 0}
    matrices = sum(
        p.numel() for name, p in model.named_parameters()
        if p.ndim == 2 and (".attn." in name or name.startswith("layers.0.mlp"))
    )  # fmt: skip
    assert plans[1].recomputed.forward(**sizes) == 2 * matrices * sizes["num_tokens"]
    assert none < some < all_
    assert plans[1].recomputed.per_pair == plans[0].flops.per_pair


def on_meta(build):
    with torch.device("meta"):
        return build()


def settings(**changes):
    return replace(StepSettings(mesh=MeshShape(1, 2, 1), compute_dtype=FP32), **changes)


@pytest.mark.parametrize(
    ("dtype", "build", "masked"),
    [
        (BF16, lambda: qwen3_moe_tiny(vocab_size=64), False),
        (FP32, lambda: qwen3_moe_tiny(vocab_size=64), True),
        (BF16, latent_decoder, False),
        (BF16, lambda: latent_decoder(v_head_dim=260), True),
        (BF16, lambda: latent_decoder(v_head_dim=36), True),
    ],
)
def test_a_mask_is_planned_where_no_kernel_goes_by_documents(dtype, build, masked):
    model = on_meta(build)
    shape = {"compute_dtype": dtype, "seq_len": 256, "checkpointing": False}
    plain, packed = (
        plan_step(model, settings(packed=packed, **shape)).memory.activations.kept
        for packed in (False, True)
    )
    assert (packed > plain) is masked
    for layer in model.layers:
        layer.attn.dropout = 0.1
    dropping = plan_step(model, settings(packed=True, **shape)).memory.activations.kept
    assert dropping > plain


def test_bytes_by_hand():
    """Two processes, fp32: every number is a sum over one layer's tensors."""
    model = on_meta(lambda: qwen3_moe_tiny(vocab_size=64))
    memory = plan_step(model, settings()).memory
    total = sum(p.numel() for p in model.parameters())
    experts, router = 3 * 8 * 64 * 32, 8 * 64
    layer = total_of(model.layers[0]) - experts - router
    root = 2 * 64 * 64 + 64
    assert total == 2 * (experts + router + layer) + root
    assert (memory.parameters, memory.gradients, memory.states) == (2 * total, 2 * total, 4 * total)
    assert memory.held == 8 * total
    # both layers and what stays; all of it where nothing is freed
    assert memory.gathered == 4 * (root + 2 * router + 2 * (experts + layer))
    kept = plan_step(model, settings(reshard_after_forward=False)).memory
    assert kept.gathered == 4 * (total + experts)  # and the buffer that experts came in
    assert memory.reducing == 2 * 4 * experts
    assert (memory.root_gradient, memory.root_reducing) == (4 * root, 4 * root)
    in_bf16 = plan_step(model, settings(compute_dtype=BF16)).memory
    assert in_bf16.reducing == (2 + 4) * experts  # computed in bf16, added up in fp32
    assert in_bf16.gathered == 2 * (root + 2 * (experts + layer)) + 4 * 2 * router


def test_one_layer_and_the_buffer_it_came_in():
    model = on_meta(wide_experts)
    experts, rest = total_of(model.layers[0].mlp.experts), total_of(model)
    assert plan_step(model, settings()).memory.gathered == 4 * (rest + experts)
    alone = settings(mesh=MeshShape(1, 1, 2))  # experts are here: copied, not sent
    layer = rest - experts - total_of(model.layers[0].mlp.router) - 2 * 64 * 64 - 64
    assert plan_step(model, alone).memory.gathered == 4 * (rest - experts + experts // 2 + layer)


def total_of(module):
    return sum(p.numel() for p in module.parameters())


def test_the_peak_is_the_worst_moment():
    memory = plan_step(on_meta(lambda: qwen3_moe_tiny(vocab_size=64)), settings()).memory
    work = replace(memory.activations, kept=10, layer=7, recomputed=0, logits=5, moving=2)
    memory = replace(memory, parameters=100, states=0, gathered=1000, stays=400, gradients=0,
                     early_gradients=0, late_gradients=0, root_gradient=3, root_reducing=4,
                     layer_backward=20, activations=work)  # fmt: skip
    assert memory.peak == 1100 + 10 + 3 + 20 + 2  # the last layer's: all is kept
    assert replace(memory, early_gradients=50).peak == 1100 + 50 + 10 + 3 + 20 + 2
    assert replace(memory, late_gradients=50).peak == 1100 + 50 + 7 + 3 + 20 + 2
    # the loss's, when no layer is gathered
    assert replace(memory, activations=replace(work, logits=999)).peak == 500 + 10 + 999
    assert replace(memory, gradients=700, root_reducing=300).peak == 500 + 700 + 3 + 300
    again = replace(work, recomputed=6)  # of the first layer nothing else is kept
    assert replace(memory, late_gradients=50, activations=again).peak == 1100 + 50 + 6 + 3 + 20 + 2


@pytest.mark.parametrize(
    ("component", "storage", "bytes_each"),
    [
        ({"_component_": "torch.optim.AdamW"}, FP32, 8),
        ({"_component_": "torch.optim.AdamW", "amsgrad": True}, FP32, 12),
        ({"_component_": "moe_builders.training.low_bit.AdamW"}, BF16, 8),
        ({"_component_": "moe_builders.training.low_bit.AdamW8bit"}, BF16, 2 + 8 / 256),
        ({"_component_": "moe_builders.training.low_bit.AdamW4bit"}, BF16, 1 + 8 / 128),
        ({"_component_": "moe_builders.training.low_bit.AdamW8bit", "block_size": 64}, BF16, 2.125),
    ],
)
def test_states_of_an_optimizer(component, storage, bytes_each):
    """Of experts; norms and routers, and what is too small, have fp32 states."""
    model = on_meta(lambda: qwen3_moe_tiny(vocab_size=64))
    given = settings(optimizer=component, param_dtype=storage, compute_dtype=BF16)
    plan = plan_step(model, given)
    quantised = {"experts.gate_up_proj", "experts.down_proj"}
    wanted = 0
    for held in plan.held:
        big = held.name.split("mlp.")[-1] in quantised or held.numel >= 4096
        wanted += held.numel * (bytes_each if big else max(8, bytes_each // 1))
    assert plan.memory.states == pytest.approx(wanted, abs=1)
    offloaded = plan_step(model, replace(given, offload_optimizer=True)).memory
    assert (offloaded.states, offloaded.host_states) == (0, plan.memory.states)


def test_states_that_are_given_or_unknown():
    model = on_meta(lambda: qwen3_moe_tiny(vocab_size=64))
    lion = {"_component_": "mymodel.Lion"}
    with pytest.raises(InputError, match=r"^what mymodel.Lion keeps is not known: set state_bytes"):
        plan_step(model, settings(optimizer=lion))
    plan = plan_step(model, settings(optimizer=lion, state_bytes=4))
    assert plan.memory.states == plan.memory.parameters


def test_a_group_s_gradients_in_backward():
    model = on_meta(lambda: qwen3_moe_tiny(vocab_size=64))
    memory = plan_step(model, settings(in_backward=True)).memory
    assert memory.gradients == 4 * 3 * 8 * 64 * 32 // 2


def test_shards_of_every_size():
    """5 rows over 4 processes: 2, 2, 1, 0, and all make room for 2."""
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(3, 5, bias=False)])
    (held,) = shown_hold(model, MeshShape(1, 4, 1))
    assert [held.local_shape(rank) for rank in range(4)] == [(2, 3), (2, 3), (1, 3), (0, 3)]
    assert (held.numel, held.gathered_numel, held.numels()) == (6, 24, {6, 3, 0})
    (held,) = shown_hold(model, MeshShape(3, 5, 1))
    assert held.local_shape(14) == (1, 3)
    assert held.numels() == {3}
    (held,) = shown_hold(model, MeshShape(1, 3, 1))
    assert held.numels() == {6, 3}


def shown_hold(model, mesh):
    from moe_builders.parallel.holdings import Parameter, hold
    from moe_builders.parallel.plan import sharding_plan

    parameters = {n: Parameter(tuple(p.shape)) for n, p in model.named_parameters()}
    groups = sharding_plan(["layers.0", ""])
    return hold(parameters, groups, mesh, param_dtype=FP32)


def test_bytes_that_leave_a_process():
    mesh = MeshShape(1, 4, 8)  # 4 nodes of 8
    ring = Collective("", "all_gather", "dp_shard × ep", 32, 1, 3200.0)
    assert ring.sent == 3100
    assert ring.sent_inside(mesh, node_size=8) == 3100
    assert ring.sent_outside(mesh, node_size=8) == 3100 / 8  # 8 share the node's border
    assert replace(ring, what="all_reduce").sent == 6200
    apart = Collective("", "reduce_scatter", "dp_shard", 4, 1, 400.0)  # one in each node
    assert (apart.sent_inside(mesh, node_size=8), apart.sent_outside(mesh, node_size=8)) == (0, 300)
    home = Collective("", "all_to_all", "ep", 8, 1, 800.0)
    assert (home.sent_inside(mesh, node_size=8), home.sent_outside(mesh, node_size=8)) == (700, 0)
    wide = Collective("", "all_to_all", "ep", 16, 1, 1600.0)
    across = wide.sent_inside(mesh, node_size=8), wide.sent_outside(mesh, node_size=8)
    assert across == (700, 800)
    alone = Collective("", "all_reduce", "dp_replicate", 1, 1, 8.0)
    assert alone.sent == 0


def test_a_model_of_1024_processes():
    """The sum of what all hold is the model and its padding, and each holds its part."""
    model = on_meta(deepseek_v3_671b)
    plan = plan_step(model, settings(mesh=MeshShape(2, 8, 64), compute_dtype=BF16))
    assert sum(p.numel() for p in model.parameters()) == 671_026_404_352
    copy = plan.memory.parameters * 512
    assert 4 * 671_026_404_352 <= copy < 4.03 * 671_026_404_352
    (gate_up,) = {h.axes for h in plan.held if h.name.endswith("gate_up_proj")}
    assert gate_up == "0: ep 64, 1: dp_shard 8"  # 4 experts over 8 processes: rows of each
    flops = plan.step_flops
    longer = plan_step(model, settings(mesh=MeshShape(2, 8, 64), accumulation=3)).step_flops
    assert longer == 3 * flops
    assert flops == pytest.approx(8 * 4096 * 37.0e9, rel=0.15)  # 2 · 4 passes, and attention


def test_experts_that_ep_does_not_divide():
    model = on_meta(lambda: qwen3_moe_tiny(vocab_size=64))
    with pytest.raises(
        InputError, match=r"^ep is 3, but must divide the 8 experts of layers.0.mlp"
    ):
        plan_step(model, settings(mesh=MeshShape(1, 1, 3)))


def test_activations_of_a_decoder():
    model, given = latent_decoder(), {"mask_len": 0, "compute_dtype": BF16}
    model.linear_cross_entropy = "none"
    each = [layer_bytes(layer, **given) for layer in model.layers]
    all_kept = count_activations(model, num_tokens=10, checkpointing=False, **given)
    assert all_kept.kept == 10 * (sum(each) + 2 * 64 * 2)
    assert all_kept.recomputed == all_kept.moving == 0
    few = count_activations(model, num_tokens=10, checkpointing=True, **given)
    routing = 2 * 8 * 4 + 2 * (4 * 8 + 2 * 4)
    assert few.kept == 10 * (2 * 64 * 2 + routing + 2 * 64 * 2)
    assert few.recomputed == 10 * max(each)
    some = count_activations(model, num_tokens=10, checkpointing=True, ac_mode="selective", **given)
    dense, between, ends = 2 * (64 + 4 * 96), 2 * 64 * 2, 2 * 64 * 2
    attends = each[0] - between - dense
    assert some.recomputed == 10 * max(attends, dense)
    assert some.kept == 10 * (between + each[1] - attends + ends)
    assert few.logits == all_kept.logits == 3 * 10 * 64 * 4
    model.linear_cross_entropy = "chunked"
    fused = count_activations(model, num_tokens=10, checkpointing=True, **given)
    # tokens' gradients; the weight's before and after it was multiplied
    assert replace(few, logits=10 * 64 * 2 + 2 * 64 * 64 * 2) == fused
    # a chunk's logits, tokens and two blocks in fp32 need more than the latter
    fused = count_activations(model, num_tokens=20, checkpointing=True, **given)
    assert fused.logits == 20 * 64 * 2 + 64 * 64 * 2 + (20 * (64 + 64) * 2 + 2 * 20 * 64 * 4)
    for dispatcher, copies in (("all_to_all", 2 * 2), ("all_gather", 2 * 4)):
        moving = count_activations(model, num_tokens=10, checkpointing=True, ep=4,
                                   dispatcher=dispatcher, **given).moving  # fmt: skip
        assert moving == 10 * copies * 64 * 2


class Strange(nn.Module):
    output_proj = nn.Linear(2, 2)


def test_parts_that_nobody_knows():
    model = latent_decoder()
    layer = model.layers[0]
    layer.attn = Strange()
    with pytest.raises(InputError, match=r"^activations of the attention Strange are not known"):
        layer_bytes(layer, mask_len=0, compute_dtype=FP32)
    layer = model.layers[1]
    layer.mlp = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"^activations of the mlp Linear are not known"):
        layer_bytes(layer, mask_len=0, compute_dtype=FP32)
