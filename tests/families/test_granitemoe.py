"""Granite-MoE's two model types, and the dropout that some of its config.json ask for."""

import pytest
import torch
from helpers_parity import all_cases

from moe_builders.errors import InputError
from moe_builders.families.granitemoe import FAMILY, SHARED_FAMILY


def written(model_type, **changes):
    return all_cases()[model_type].written_config("plain") | changes


def test_shared_experts_are_of_the_other_model_type():
    config = written("granitemoeshared")
    assert SHARED_FAMILY.builder_arguments(config)["shared_hidden_dim"] == 40
    with pytest.raises(InputError, match=r"a granitemoe holds .*shared_intermediate_size=40"):
        FAMILY.builder_arguments(config)
    alone = SHARED_FAMILY.builder_arguments(config | {"shared_intermediate_size": 0})
    plain = FAMILY.builder_arguments(written("granitemoe", num_key_value_heads=2))
    assert alone == plain | {"shared_hidden_dim": None}


def test_attention_dropout_is_for_training():
    model = FAMILY.build(written("granitemoe", attention_dropout=0.5))
    plain = FAMILY.build(written("granitemoe"))
    plain.load_state_dict(model.state_dict())
    tokens = torch.arange(20)[None]
    torch.manual_seed(0)
    with torch.no_grad():
        assert not torch.equal(model(tokens), model(tokens))
        assert torch.equal(model.eval()(tokens), plain(tokens))
    with pytest.raises(InputError, match=r"attention_dropout=1 \(a number from 0 to below 1\)"):
        FAMILY.builder_arguments(written("granitemoe", attention_dropout=1))
