"""Where training starts: an HF folder, a folder of our own, random weights; and back to disk."""

import dataclasses
import json
import shutil

import pytest
import torch
from helpers_data import write_tokenizer
from hf_helpers import rewrite, write_hf_folder
from safetensors.torch import load_file

from moe_builders.base_model import check_fits, check_paths, open_base_model
from moe_builders.errors import InputError
from moe_builders.families import BY_MODEL_TYPE, qwen3_moe
from moe_builders.hub import load_hf_model
from moe_builders.initialization import initial_value
from moe_builders.weights import PassThrough

CPU = torch.device("cpu")
OWN = {"_component_": "moe_builders.families.qwen3_moe.qwen3_moe_tiny", "vocab_size": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = write_hf_folder(tmp_path_factory.mktemp("hf") / "source")
    return write_tokenizer(path)


def opened(folder=None, component=None, **changes):
    options = {"dtype": torch.float32, "device": CPU, "seed": 0, "init_std": 0.02} | changes
    return open_base_model(None if folder is None else str(folder), component, **options)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_hugging_face_folder_waits_on_the_meta_device_and_leaves_as_it_came(folder, tmp_path):
    base = opened(folder)
    assert {p.device.type for p in base.model.parameters()} == {"meta"}
    assert (base.folder, base.component) == (str(folder), None)
    model = base.fill(CPU)
    reference, _ = load_hf_model(folder)
    wanted = weights(reference)
    assert all(torch.equal(value, wanted[name]) for name, value in weights(model).items())
    base.save(tmp_path / "out")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (
        folder / "tokenizer.json"
    ).read_bytes()


def test_random_weights_are_those_of_seed_and_name():
    base = opened(component=OWN, seed=3, init_std=0.5)
    assert base.fill(CPU) is base.model, "nothing to fill"
    for name, value in weights(base.model).items():
        assert torch.equal(value, initial_value(name, value, seed=3, std=0.5)), name
    again, other = opened(component=OWN, seed=3, init_std=0.5), opened(component=OWN, seed=4)
    name = "layers.0.mlp.experts.down_proj"
    assert torch.equal(weights(again.model)[name], weights(base.model)[name])
    assert not torch.equal(weights(other.model)[name], weights(base.model)[name])


def test_without_init_std_the_modules_own_values_stay():
    torch.manual_seed(5)
    drawn = weights(opened(component=OWN, init_std=None).model)
    torch.manual_seed(5)
    from moe_builders.families.qwen3_moe import qwen3_moe_tiny

    wanted = weights(qwen3_moe_tiny(vocab_size=64))
    assert all(torch.equal(value, wanted[name]) for name, value in drawn.items())


def test_a_folder_of_our_own_goes_on_where_it_stopped(tmp_path):
    first = opened(component=OWN, seed=9, init_std=0.3)
    first.save(tmp_path / "saved")
    marker = json.loads((tmp_path / "saved/moe_builders.json").read_text())
    assert marker["component"] == OWN
    second = opened(tmp_path / "saved", OWN, seed=1)
    assert {p.device.type for p in second.model.parameters()} == {"meta"}
    second.fill(CPU)
    wanted = weights(first.model)
    assert all(torch.equal(value, wanted[name]) for name, value in weights(second.model).items())
    second.save(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        tmp_path / "saved/model.safetensors"
    ).read_bytes()
    assert json.loads((tmp_path / "again/moe_builders.json").read_text()) == marker


def test_weights_are_rescued_when_their_layout_is_gone(folder, tmp_path):
    """The folder that gives config and tokenizer was moved while the run trained."""
    shutil.copytree(folder, tmp_path / "moved")
    base = opened(tmp_path / "moved")
    trained = weights(base.fill(CPU))
    shutil.rmtree(tmp_path / "moved")
    with pytest.raises(InputError, match=r"is gone; .* saved to .*/run/model.own_names$"):
        base.save(tmp_path / "run/model")
    assert not (tmp_path / "run/model").exists()
    rescued = load_file(tmp_path / "run/model.own_names/model.safetensors")
    assert rescued.keys() == trained.keys()
    assert all(torch.equal(value, trained[name]) for name, value in rescued.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_all_parameters_are_stored_alike_but_routers_in_no_less_than_fp32(folder, tmp_path, dtype):
    opened(component=OWN).save(tmp_path / "own")
    for base in (
        opened(folder, dtype=dtype),
        opened(component=OWN, dtype=dtype),
        opened(tmp_path / "own", OWN, dtype=dtype),
    ):
        found = {n: p.dtype for n, p in base.fill(CPU).named_parameters()}
        routers = {name for name in found if ".router." in name}
        wide = torch.promote_types(dtype, torch.float32)
        assert routers
        assert found == {name: wide if name in routers else dtype for name in found}


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda f, own: (None, None), "there is no model: set base_model to a Hugging Face folder"),
        (lambda f, own: (f, OWN), "is a Hugging Face folder, whose config.json says what to build"),
        (lambda f, own: (own, None), "saved under our own names.*the component that its moe_build"),
        (lambda f, own: (own / "nowhere", None), "is not a Hugging Face model folder"),
        (lambda f, own: (None, {"_component_": "torch.nn.Flatten"}), "model._component_ built a"),
        (lambda f, own: (None, OWN | {"vocab": 3}), "unknown key model.vocab"),
        (lambda f, own: (own, OWN | {"vocab_size": "many"}), "model.vocab_size is 'many', but"),
    ],
)  # fmt: skip
def test_what_does_not_make_a_model(folder, tmp_path, give, message):
    opened(component=OWN).save(tmp_path / "own")
    with pytest.raises(InputError, match=message) as caught:
        opened(*give(folder, tmp_path / "own"))
    assert "\n" not in str(caught.value)


def test_what_a_model_can_take():
    model = opened(component=OWN).model
    check_fits(model, max_seq_len=512, vocab_size=64)
    check_fits(model)
    with pytest.raises(InputError, match="max_seq_len is 513, but the model takes 512 tokens"):
        check_fits(model, max_seq_len=513)
    with pytest.raises(InputError, match="tokenizer has 65 ids, but the model's vocabulary only 6"):
        check_fits(model, vocab_size=65)


def test_both_ends_of_a_run(folder, tmp_path):
    check_paths(tmp_path / "new", base_model=str(folder))
    assert not (tmp_path / "new").exists(), "looking writes nothing"
    (tmp_path / "out/model").mkdir(parents=True)
    check_paths(tmp_path / "out", base_model=None)
    (tmp_path / "out/model/notes.txt").touch()
    with pytest.raises(InputError, match="no run has written it"):
        check_paths(tmp_path / "out", base_model=None)
    (tmp_path / "out/torchtune_config.yaml").touch()
    check_paths(tmp_path / "out", base_model=None)
    opened(component=OWN).save(tmp_path / "deep/model/inside")
    with pytest.raises(InputError, match="replace base_model"):
        check_paths(tmp_path / "deep", base_model=str(tmp_path / "deep/model/inside"))
    with pytest.raises(InputError, match="nowhere is not a folder"):
        check_paths(tmp_path / "new", base_model=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="is base_model itself"):
        check_paths(folder, base_model=str(folder))


def test_weights_are_not_lost_when_the_source_has_gone(folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    base = opened(source)
    model = base.fill(CPU)
    shutil.rmtree(source)
    with pytest.raises(InputError, match=r"is gone.*trained weights were saved to .*own_names"):
        base.save(tmp_path / "model")
    rescued = load_file(tmp_path / "model.own_names/model.safetensors")
    assert all(torch.equal(rescued[name], value) for name, value in model.state_dict().items())


def test_weights_that_can_be_saved_nowhere_are_told(folder, tmp_path):
    base = opened(folder)
    base.fill(CPU)
    for name in ("model", "model.own_names"):
        (tmp_path / name).write_text("in the way")
    with pytest.raises(InputError, match=r"^the trained model could not be saved \(.*/model is a "
                       r".*, nor could .*/model.own_names is a .*: make room or mend"):  # fmt: skip
        base.save(tmp_path / "model")


def test_what_the_model_has_no_place_for_is_told(folder, tmp_path, monkeypatch):
    assert opened(folder).notes == []
    assert opened(component=OWN).notes == []
    copy = tmp_path / "source"
    shutil.copytree(folder, copy)
    rows = (*qwen3_moe.WEIGHT_MAP, PassThrough("mtp.{*}"))
    family = dataclasses.replace(qwen3_moe.FAMILY, weight_map=rows)
    monkeypatch.setitem(BY_MODEL_TYPE, "qwen3_moe", family)
    rewrite(copy, {"mtp.a": torch.ones(1)})
    assert opened(copy).notes == [
        f"1 tensor of {copy} without a place in the model will not be trained, and will be "
        "exported as found: mtp.a"
    ]
    rewrite(copy, {f"mtp.{letter}": torch.ones(1) for letter in "bcde"})
    base = opened(copy)
    (note,) = base.notes
    assert note.startswith(f"5 tensors of {copy} without")
    assert note.endswith("exported as found: mtp.a, mtp.b, mtp.c and 2 more")
    base.fill(CPU, weights=False)
    assert base.notes == [note], "also where a checkpoint gives the weights"
