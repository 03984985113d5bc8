"""The sparse block against its formula, alone and in a decoder's mlp slot."""

import pytest
import torch
from helpers import D, assert_near, moe_of, randomise
from torch import nn

from moe_builders.blocks import SparseMoEBlock, sparse_moe_block
from moe_builders.decoder import MoEDecoderLayer
from moe_builders.routing import TokenInfo


def block_of(*, before=True, after=True, **more):
    made = sparse_moe_block(
        embed_dim=D, moe=moe_of(), add_ff_before=before, add_ff_after=after, **more
    )
    return randomise(made).double()


def plain_norm(norm, x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("after", [True, False])
def test_formula(before, after):
    block = block_of(before=before, after=after)
    x = torch.randn(2, 5, D, dtype=torch.float64)
    wanted = x
    if before:
        wanted = block.ff_before(plain_norm(block.ff_before_norm, wanted)) + wanted
    wanted = block.moe(plain_norm(block.moe_norm, wanted)) + wanted
    if after:
        wanted = block.ff_after(plain_norm(block.ff_after_norm, wanted)) + wanted
    assert_near(block(x), wanted, 1e-12)
    names = {name.split(".")[0] for name, _ in block.named_parameters()}
    assert ("ff_before" in names, "ff_before_norm" in names) == (before, before)
    assert ("ff_after" in names, "ff_after_norm" in names) == (after, after)
    block.residual = False
    assert_near(block(x), wanted - x, 1e-12)


def test_defaults_and_widths():
    block = sparse_moe_block(embed_dim=D, moe=moe_of())
    assert block.ff_before is None
    assert block.ff_after.w1.weight.shape == (16, D)  # ⌊8 · 6 / 3⌋
    narrow = sparse_moe_block(embed_dim=D, moe=moe_of(), ff_hidden_dim=9)
    assert narrow.ff_after.w1.weight.shape == (9, D)
    own = SparseMoEBlock(moe=moe_of(), dim=D, ff_before=nn.Identity(), norm_eps=0.5)
    assert own.moe_norm.eps == own.ff_before_norm.eps == 0.5
    assert own.ff_after is None


def test_masked_tokens_pass_the_dense_networks_and_reach_no_expert():
    block = block_of()
    x = torch.randn(7, D, dtype=torch.float64)
    mask = torch.arange(7) < 4
    y = block(x, TokenInfo(mask=mask))
    assert int(block.moe.last_routing.num_tokens_per_expert.sum()) == 8
    dense = x + block.ff_before(block.ff_before_norm(x))
    dense = dense + block.ff_after(block.ff_after_norm(dense))
    assert_near(y[~mask], dense[~mask], 1e-12)
    assert_near(y[mask], block(x[mask]), 1e-12)


def test_every_parameter_learns():
    block = block_of()
    block(torch.randn(9, D, dtype=torch.float64)).square().sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad.any(), name


class NoAttention(nn.Module):
    def forward(self, x, *_, mask=None, input_pos=None):
        return torch.zeros_like(x)


def test_as_an_mlp_it_adds_its_branches_and_is_told_the_mask():
    """Behind an identity for the layer's norm, layer and block are the same."""
    block = block_of(residual=False)
    layer = MoEDecoderLayer(
        attn=NoAttention(), mlp=block, sa_norm=nn.Identity(), mlp_norm=nn.Identity()
    )
    x = torch.randn(1, 7, D, dtype=torch.float64)
    info = TokenInfo(mask=torch.arange(7) < 4)
    got = layer(x, info=info)
    block.residual = True
    assert_near(got, block(x, info), 1e-12)
