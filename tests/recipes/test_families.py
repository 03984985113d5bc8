"""The recipe trains every family: on two processes, in and out of Hugging Face's layout."""

import json
import shutil

import pytest
import torch
from helpers_families import VOCAB, config_of, families, trained, write_base
from helpers_parity import NEVER_TRAINED, all_cases, draw_tokens, load_reference
from helpers_train import on_ranks
from hf_helpers import read_tensors, rewrite

from moe_builders.hub import carried_over, load_hf_model

FAMILIES = families()
RESUMED = ("deepseek_v3", "gpt_oss")  # a buffer and latents; sinks and biases
COMPILED = ("deepseek_v3", "gpt_oss")
FEWER_LAYERS = {"deepseek_v3": {"first_k_dense_replace": 0}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def runs(root, request):
    """The runs that the chosen tests look at, all in one launch of two processes."""
    tests = [item for item in request.session.items if item.path == request.path]
    chosen = {item.callspec.params["family"] for item in tests}
    cases = {}
    for name in sorted(chosen):
        base = write_base(all_cases()[name], root / name / "base")
        cases[name] = ("helpers_families.trained", config_of(name, base, root / name / "run"))
        if name in RESUMED:
            cfg = config_of(name, base, root / name / "straight", max_steps=4)
            cases[f"{name} resumed"] = ("helpers_resume.differences_after_resuming", cfg, [2])
    return on_ranks(2, cases, root)


@pytest.fixture
def run(runs, family):
    assert "failed" not in runs[family], runs[family]["failed"]
    return runs[family]


@pytest.fixture
def folders(root, run, family):
    return root / family / "base", root / family / "run" / "model"


def _tensors(folder):
    return read_tensors(sorted(folder.glob("*.safetensors")))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_falls(run):
    losses = torch.tensor([values["loss"] for values in run["history"]])
    assert losses[-5:].mean() < 0.6 * losses[:3].mean(), losses
    for name in ("balance", "z", "grad_norm"):
        values = torch.tensor([values[name] for values in run["history"]])
        assert torch.isfinite(values).all()
        assert (values > 0).all(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_all_weights_learn_and_nothing_else_changes(family, run, folders):
    before, after = map(_tensors, folders)
    assert before.keys() == after.keys()
    model, source = load_hf_model(folders[0])
    carried = set(carried_over(model, source))
    assert carried == all_cases()[family].extra_tensors.keys()
    for name, (_, old) in before.items():
        new = after[name][1]
        assert (new.dtype, new.shape) == (old.dtype, old.shape), name
        fixed = name in carried or NEVER_TRAINED.search(name) is not None
        assert torch.equal(new, old) is fixed, name
    wanted = {n: b for n, b in model.named_buffers() if n in model.state_dict()}
    for buffers in run["buffers"]:
        assert buffers.keys() == wanted.keys()
        for name, buffer in buffers.items():
            assert buffer.dtype == wanted[name].dtype == torch.float32, name
            assert torch.equal(buffer, wanted[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_is_the_same_model_in_transformers(family, folders, tmp_path):
    base, export = folders
    assert json.loads((export / "config.json").read_text()) == json.loads(
        (base / "config.json").read_text()
    )
    case = all_cases()[family]
    ours, _ = load_hf_model(export)
    alone = tmp_path / "alone"  # transformers lists what it has no place for
    shutil.copytree(export, alone)
    rewrite(alone, dict.fromkeys(case.extra_tensors))
    theirs = load_reference(case, alone)
    real = torch.ones(2, 24, dtype=torch.bool)
    tokens = draw_tokens(ours, real)
    assert tokens.max() < VOCAB
    with torch.no_grad():
        found, wanted = ours(tokens), theirs(input_ids=tokens).logits
    assert wanted.std() > 0.3
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["deepseek_v3"])
def test_one_process_trains_as_two(family, root, run, tmp_path, capsys):
    base = root / family / "base"
    alone = trained(config_of(family, base, tmp_path, batch_size=4))
    for name in ("loss", "balance", "z"):
        one, two = (torch.tensor([v[name] for v in r["history"]]) for r in (alone, run))
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    note = f"tensors of {base} without a place in the model will not be trained"
    assert capsys.readouterr().out.count(note) == bool(all_cases()[family].extra_tensors)


@pytest.mark.parametrize("family", RESUMED)
def test_a_run_gone_on_with_ends_in_the_same_bytes(family, runs):
    assert runs[f"{family} resumed"] == {2: []}


@pytest.mark.full  # inductor: some 20 s a family
@pytest.mark.parametrize("family", COMPILED)
def test_compiled_layers_give_the_same_losses(family, tmp_path):
    base, losses = tmp_path / "base", []
    write_base(all_cases()[family], base, num_hidden_layers=1, **FEWER_LAYERS.get(family, {}))
    for compiled in (False, True):
        changes = {"compile": compiled, "max_steps": 3, "compute_dtype": "fp32"}
        run = trained(config_of(family, base, tmp_path / f"{compiled}", **changes))
        assert "failed" not in run, run["failed"]
        losses.append(torch.tensor([values["loss"] for values in run["history"]]))
    torch.testing.assert_close(*losses, rtol=0, atol=1e-5)
