"""The recipe on streams, mixtures and samples that are cut: alone and on two processes."""

import moe_full_finetune as recipe
import pytest
import torch
from helpers_data import isolate_datasets, text_node, write_jsonl, write_word_tokenizer
from helpers_train import RaggedDataset, config, losses_and_weights, on_ranks

from moe_builders.errors import InputError

WORDS = [f"w{number}" for number in range(40)]
ADAMW = {"optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3}}


@pytest.fixture
def files(tmp_path, monkeypatch):
    isolate_datasets(tmp_path, monkeypatch)
    write_word_tokenizer(tmp_path / "tok", WORDS)
    stream = torch.Generator().manual_seed(0)

    def text():
        numbers = torch.randint(0, 40, (int(torch.randint(3, 20, (), generator=stream)),),
                                generator=stream)  # fmt: skip
        return {"text": " ".join(WORDS[n] for n in numbers)}

    return [write_jsonl(tmp_path / f"{name}.jsonl", [text() for _ in range(n)])
            for name, n in (("a", 40), ("b", 12))]  # fmt: skip


def config_of(folder, files, kind, **changes):
    one = {"streaming": kind != "sized mixed", "packed": kind == "packed"}
    nodes = [text_node(path, weight=weight, **one)
             for path, weight in zip(files, (1, 2), strict=True)]  # fmt: skip
    tokenizer = {"_component_": "moe_builders.data.tokenizer.HFTokenizer",
                 "path": str(files[0].parent / "tok")}  # fmt: skip
    dataset = nodes if "mixed" in kind else {k: v for k, v in nodes[0].items() if k != "weight"}
    return config(folder, dataset=dataset, tokenizer=tokenizer, shuffle_window=8, **changes)


CUT = {"max_seq_len": 10, "batch_size": 8, "shuffle": False}


def test_any_kind_trains_alike_on_two_processes(tmp_path, files):
    kinds = ("plain", "packed", "mixed", "sized mixed")
    alone = {}
    for kind in kinds:
        cfg = config_of(tmp_path / f"alone {kind}", files, kind, max_steps=4, **ADAMW)
        alone[kind] = losses_and_weights(cfg)
        assert len(alone[kind]["loss"]) == 4
    cases = {kind: ("losses_and_weights", config_of(tmp_path / f"two {kind}", files, kind,
                    max_steps=4, batch_size=2, **ADAMW)) for kind in kinds}  # fmt: skip
    cases["cut"] = "first_step", config(tmp_path / "cut", **CUT | {"batch_size": 4})
    together = on_ranks(2, cases, tmp_path)
    for kind in kinds:
        wanted = torch.tensor(alone[kind]["loss"])
        assert torch.allclose(torch.tensor(together[kind]["loss"]), wanted, atol=0, rtol=1e-5)
    assert together["cut"]["values"]["cut_samples"] == first_longer(), "over both processes"
    assert len({round(alone[kind]["loss"][0], 6) for kind in kinds}) > 1, "they are other data"


def test_a_stream_that_ends_before_max_steps_ends_the_run(tmp_path, files):
    val = text_node(files[1], streaming=True)
    cfg = config_of(tmp_path / "out", files, "plain", max_steps=100, epochs=2, dataset_val=val,
                    batch_size=8, run_val_every_n_steps=5)  # fmt: skip
    trained = recipe.main(cfg)
    assert [values["step"] for values in trained.history] == list(range(1, 11)), "2 · 40 / 8"
    assert [values["step"] for values in trained.validations] == [0, 5, 10], "each once"
    assert trained.validations[0]["val_loss"] > trained.validations[-1]["val_loss"]
    assert (trained.model_folder / "model.safetensors").exists()


def test_a_stream_needs_max_steps(tmp_path, files):
    with pytest.raises(InputError, match="max_steps is missing: nobody knows how long a stream"):
        recipe.main(config_of(tmp_path / "out", files, "plain"))
    with pytest.raises(InputError, match="epochs is 2, but a mixture with a stream in it has no"):
        recipe.main(config_of(tmp_path / "out", files, "mixed", epochs=2, max_steps=3))


def test_cut_samples_are_counted(tmp_path):
    trained = recipe.main(config(tmp_path / "a", max_steps=2, **CUT))
    assert trained.history[0]["cut_samples"] == first_longer() > 0


def first_longer():
    return sum(len(sample["tokens"]) > 10 for sample in RaggedDataset(None).samples[:8])


def test_what_was_cut_is_said_at_the_start(tmp_path, capsys):
    dataset = {"_component_": "helpers_train.RaggedDataset", "packed": True}
    recipe.main(config(tmp_path / "a", max_seq_len=20, max_steps=1, dataset=dataset))
    out = capsys.readouterr().out
    assert "samples are longer than max_seq_len (20) and were cut there: " in out
