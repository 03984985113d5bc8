"""Why sequences are not split over processes: what torch cannot do with our attention.

Each test fails on the day torch can, so that somebody notices: docs/scaling.md, "Long sequences".
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.experimental._context_parallel import _attention

from moe_builders.families.qwen3_moe import qwen3_moe_tiny
from moe_builders.ops.masks import block_causal_mask

S = 8


@pytest.fixture
def mesh(monkeypatch):
    """One process is enough: what is missing is asked for before anything is sent."""
    monkeypatch.setattr(_attention._cp_options, "enable_load_balance", False)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("cp",))
    dist.destroy_process_group()


def test_on_a_cpu_there_is_no_rule_for_causal_attention(mesh):
    tokens, model = torch.zeros(1, S, dtype=torch.long), qwen3_moe_tiny(vocab_size=64)
    before = F.scaled_dot_product_attention
    with (
        pytest.raises(
            NotImplementedError, match=r"attention_for_cpu\.default does not have a shard"
        ),
        context_parallel(mesh, buffers=[tokens], buffer_seq_dims=[1]),
    ):
        model(tokens)
    assert F.scaled_dot_product_attention is before


@pytest.mark.parametrize("kernel", ["efficient", "cudnn"])
def test_on_a_gpu_there_is_none_for_masks(mesh, kernel):
    """Both of the kernels that take a mask; the third, flash, takes none."""
    ring = getattr(_attention, f"_scaled_dot_product_ring_{kernel}_attention")
    q = torch.zeros(1, 2, S, 4)
    mask = block_causal_mask(torch.zeros(1, S, dtype=torch.long))[:, None]
    with pytest.raises(NotImplementedError, match=r"attn_bias is not supported yet"):
        ring(mesh, q, q, q, mask.float(), True)


def test_flex_attention_has_no_backward_on_a_cpu():
    from torch.nn.attention.flex_attention import flex_attention

    q = torch.zeros(1, 1, 16, 16, requires_grad=True)
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        flex_attention(q, q, q)
