"""The preview: what is shown of a row, counted by hand, and mistakes as one sentence."""

import os
import pty
import subprocess
import sys

import pytest
from helpers_data import chat_node, text_node, write_jsonl, write_word_tokenizer
from omegaconf import OmegaConf

from moe_builders.data.preview import parse, preview
from moe_builders.parallel.launch import launch, wants_color

WORDS = ["user", "assistant", "hi", "there", "two", "four"]
CHATS = [
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hi there"}],
    [{"role": "user", "content": "two two"}, {"role": "assistant", "content": "four"}],
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_word_tokenizer(tmp_path / "base", WORDS)  # no weights: no model is loaded
    write_jsonl(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    write_jsonl(tmp_path / "texts.jsonl", [{"text": "hi there two four"}, {"text": "two"}])
    OmegaConf.save(OmegaConf.create({
        "output_dir": "out", "base_model": "base", "dataset": chat_node("chats.jsonl"),
        "dataset_val": text_node("texts.jsonl"), "max_seq_len": 32, "shuffle": False,
        "optimizer": {"_component_": "torch.optim.AdamW"},
    }), tmp_path / "my.yaml")  # fmt: skip
    return tmp_path


def shown(capsys, *argv, code=0):
    assert launch(preview, lambda: parse(["--config", "my.yaml", *argv])) == code
    out, err = capsys.readouterr()
    return err if code else out


def test_chats_by_hand(place, capsys):
    assert shown(capsys) == (
        "=== row 0: 9 tokens, 3 trained on, 1 documents\n"
        "<|im_start|> user hi <|im_end|> <|im_start|> assistant[[ hi there <|im_end|>]]\n"
        "=== row 1: 9 tokens, 2 trained on, 1 documents\n"
        "<|im_start|> user two two <|im_end|> <|im_start|> assistant[[ four <|im_end|>]]\n"
        "2 rows: 18 tokens, 5 of them trained on (28 %); 0 samples longer than max_seq_len (32), "
        "0 tokens left out\n"
    )
    assert shown(capsys, "--rows", "1").count("===") == 1


def test_packed_rows_show_their_documents_and_what_was_cut(place, capsys):
    out = shown(capsys, "dataset.packed=true", "max_seq_len=8", "--rows", "9")
    assert out == (
        "=== row 0: 8 tokens, 2 trained on, 1 documents, 1 more left out\n"
        "<|im_start|> user hi <|im_end|> <|im_start|> assistant[[ hi there]]\n"
        "=== row 1: 8 tokens, 1 trained on, 1 documents, 1 more left out\n"
        "<|im_start|> user two two <|im_end|> <|im_start|> assistant[[ four]]\n"
        "2 rows: 16 tokens, 3 of them trained on (19 %); 2 samples longer than max_seq_len (8), "
        "2 tokens left out\n"
        "whole dataset: 2 samples are longer than max_seq_len (8) and were cut there: 2 tokens are "
        "left out\n"
    )
    out = shown(capsys, "dataset.packed=true", "max_seq_len=20")
    assert "=== row 0: 18 tokens, 5 trained on, 2 documents\n--- document 0: 9 tokens\n" in out
    assert "there <|im_end|>]]\n--- document 1: 9 tokens\n<|im_start|> user two" in out


def test_the_validation_set(place, capsys):
    out = shown(capsys, "--validation", "max_seq_len=5")
    assert out.splitlines()[:4] == [
        "=== row 0: 5 tokens, 4 trained on, 1 documents, 1 more left out",
        "<bos>[[ hi there two four]]",
        "=== row 1: 3 tokens, 2 trained on, 1 documents",
        "<bos>[[ two <eos>]]",
    ]


def test_rows_are_those_of_the_first_steps(place, capsys):
    """Shuffled by the same seed; a stream just as well."""
    orders = set()
    for seed in range(6):
        out = shown(capsys, "shuffle=true", f"seed={seed}", "--rows", "1")
        orders.add("hi there" in out)
    assert orders == {True, False}
    assert shown(capsys, "dataset.streaming=true") == shown(capsys)


def test_data_without_a_decoder_is_shown_as_ids(place, capsys):
    out = shown(capsys, "dataset={_component_: helpers_train.RaggedDataset}", "--rows", "1",
                "tokenizer={_component_: helpers_train.NoTokenizer}")  # fmt: skip
    ids = out.splitlines()[1].replace("[[", "").replace("]]", "").split()
    assert ids
    assert all(word.isdecimal() for word in ids)


MISTAKES = {
    "rows": (("--rows", "0"), "--rows is '0', but must be a number of at least 1"),
    "rows by word": (("--rows", "few"), "--rows is 'few', but must be"),
    "typo": (("batchsize=2",), "unknown key 'batchsize' in the config"),
    "no such option": (("--row=2",), "'--row=2' is not an override"),
    "no validation": (("--validation", "~dataset_val"), "the config has no dataset_val to show"),
    "missing file": (("dataset.data_files=nowhere.jsonl",), "cannot be built from nowhere.jsonl"),
    "no tokenizer": (("base_model=nowhere",), "nowhere has no tokenizer.json"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_sentence(place, capsys, case):
    argv, says = MISTAKES[case]
    err = shown(capsys, *argv, code=2)
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


def test_colour_on_a_terminal_unless_it_is_not_wanted(monkeypatch):
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal, open(os.devnull) as file:
        monkeypatch.delenv("NO_COLOR", raising=False)
        assert wants_color(terminal)
        assert not wants_color(file)
        monkeypatch.setenv("NO_COLOR", "1")
        assert not wants_color(terminal)
    os.close(reader)


def test_colours(place, capsys, monkeypatch):
    monkeypatch.setattr("moe_builders.data.preview.wants_color", lambda stream: True)
    out = shown(capsys, "--rows", "1")
    assert "assistant\033[32m hi there <|im_end|>\033[0m\n" in out
    assert "[[" not in out


def test_data_does_not_speak_to_the_terminal(place, capsys):
    """An escape sequence in a text is shown, not obeyed."""
    write_word_tokenizer(place / "base", [*WORDS, "\033[31m"])
    write_jsonl(place / "texts.jsonl", [{"text": "hi \033[31m"}])
    out = shown(capsys, "--validation")
    assert "<bos>[[ hi \\x1b[31m <eos>]]\n" in out
    assert "\033" not in out


def test_as_a_program(place):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "moe_builders.data.preview", "--config", "my.yaml",
         "--rows", "1"], capture_output=True, text=True, cwd=place)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "[[ hi there <|im_end|>]]" in done.stdout
