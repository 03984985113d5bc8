"""HunYuan's own config.json: lists for each layer, other names, and much that is off."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers_parity import Models, all_cases

from moe_builders.errors import InputError
from moe_builders.families.hunyuan_v1_moe import FAMILY, HUB_FAMILY, builder_arguments
from moe_builders.hub import load_hf_model

CONFIGS = Path(__file__).parents[1] / "assets" / "configs"


def released(**changes):
    """The release's config.json with some fields changed; None: left out."""
    config = json.loads((CONFIGS / "Hunyuan-A13B.json").read_text())
    return {k: v for k, v in (config | changes).items() if v is not None or k not in changes}


def test_both_spellings_mean_the_same():
    hub = HUB_FAMILY.builder_arguments(released())
    assert hub["experts_per_token"] == 8
    assert hub["attention_dropout"] == 0.1
    plain = released(
        model_type="hunyuan_v1_moe",
        head_dim=128,
        moe_topk=8,
        attention_head_dim=None,
        moe_intermediate_size=None,
        num_shared_expert=None,
    )
    assert FAMILY.builder_arguments(plain) == hub
    assert FAMILY.builder_arguments(plain | {"head_dim": 64})["head_dim"] == 64


def test_the_releases_own_spelling_is_transformers_model(tmp_path):
    """transformers does not know the model_type; the weights' names are the same."""
    case = all_cases()["hunyuan_v1_moe"]
    models = Models(tmp_path)
    folder = tmp_path / "hub"
    shutil.copytree(models.folder(case, "plain"), folder)
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {
        "model_type": "hunyuan", "moe_topk": [3, 3, 3], "num_shared_expert": [1, 1, 1],
        "moe_intermediate_size": [32, 32, 32], "attention_head_dim": config.pop("head_dim"),
        "rope_theta": rope.pop("rope_theta"), "use_qk_norm": True, "use_mixed_mlp_moe": True,
        "rope_scaling": {"type": rope.pop("rope_type"), **rope}, "attention_dropout": 0.3,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = load_hf_model(folder)
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert not torch.equal(model(tokens), model(tokens))  # attention_dropout
        expected = models.hf(case, "plain")(input_ids=tokens).logits
        torch.testing.assert_close(model.eval()(tokens), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moe_topk": [8] * 31}, "(a whole number of at least 2, or 32 of them)"),
        ({"moe_topk": [8] * 31 + [1]}, "(a whole number of at least 2, or 32 of them)"),
        ({"moe_intermediate_size": [3072] * 31 + [1536]}, "moe_intermediate_size=[3072, "),
        ({"moe_intermediate_size": 1536}, "moe_intermediate_size=1536"),
        ({"num_shared_expert": [1] * 31 + [2]}, "num_shared_expert=[1, "),
        ({"num_experts": [64] * 32}, "num_experts=[64, "),
        ({"use_qk_norm": None}, "use_qk_norm=None (only True)"),
        ({"use_mixed_mlp_moe": None}, "use_mixed_mlp_moe=None (only True)"),
        ({"moe_layer_num_skipped": 1}, "moe_layer_num_skipped=1 (only 0)"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor=2.5 (only 1)"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False (only True)"),
        ({"use_cla": True}, "use_cla=True (only False)"),
        ({"use_mla": True}, "use_mla=True (only False)"),
        ({"group_limited_greedy": True}, "group_limited_greedy=True (only False)"),
        ({"vit_path": "a/tower"}, "vit_path='a/tower' (only None)"),
        ({"moe_drop_tokens": True}, "moe_drop_tokens=True (only False)"),
    ],
)
def test_what_is_not_honoured_is_refused(changes, words):
    with pytest.raises(InputError) as raised:
        HUB_FAMILY.builder_arguments(released(**changes))
    assert words in str(raised.value)
    assert "config.json of a hunyuan holds" in str(raised.value)


def test_q_norms_and_shared_experts_are_on_in_transformers_files():
    config = released(use_qk_norm=None, use_mixed_mlp_moe=None, head_dim=128)
    assert builder_arguments(config) == HUB_FAMILY.builder_arguments(released())


def test_experts_per_token_of_each_layer():
    config = released(moe_topk=[8] * 31 + [4])
    arguments = HUB_FAMILY.builder_arguments(config)
    assert arguments["experts_per_token"] == (*[8] * 31, 4)
    with torch.device("meta"):
        model = HUB_FAMILY.build(config)
    assert [layer.mlp.router.experts_per_token for layer in model.layers][-2:] == [8, 4]
    with pytest.raises(InputError, match="has 32 numbers, but must have one for each of 31"):
        HUB_FAMILY.builder(**arguments | {"num_layers": 31})
