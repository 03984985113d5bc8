"""The demo on the standard library's source: its data, baselines, base model and report."""

import json
import math
import shutil
from collections import Counter, defaultdict
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from python_stdlib import prepare, report
from tokenizers import Tokenizer, pre_tokenizers

from moe_builders.hub import load_hf_model

VOCAB_SIZE = 512
ARGUMENTS = {"vocab_size": VOCAB_SIZE, "seed": 3, "max_bytes": 300_000}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    out = tmp_path_factory.mktemp("python_stdlib")
    assert prepare.prepare(out, **ARGUMENTS)
    return out


@pytest.fixture(scope="module")
def tokenizer(prepared):
    return Tokenizer.from_file(str(prepared / "base" / "tokenizer.json"))


@pytest.fixture(scope="module")
def base(prepared):
    return load_hf_model(prepared / "base")[0].eval()


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_split_is_stable_and_disjoint(prepared):
    # written down: the split must not change with machine, Python or hash seed
    assert [prepare.is_held_out(name) for name in ("struct.py", "unittest/mock.py")] == [True] * 2
    assert [prepare.is_held_out(name) for name in ("os.py", "json/decoder.py")] == [False] * 2
    share = sum(prepare.is_held_out(f"package/module_{n}.py") for n in range(10_000)) / 10_000
    assert 0.04 < share < 0.06
    train = {row["path"] for row in read_lines(prepared / "train.jsonl")}
    held_out = {row["path"] for row in read_lines(prepared / "heldout.jsonl")}
    assert train
    assert held_out
    assert not any(prepare.is_held_out(path) for path in train)
    assert all(prepare.is_held_out(path) for path in held_out)


def test_library_is_read_in_order_without_what_is_not_the_library(tmp_path):
    kept = {"b.py": "b = 1\r\n", "a/z.py": "# é\n", "a/a.py": "x\n"}
    left_out = {
        "site-packages/p.py": "x\n", "test/t.py": "x\n", "a/tests/t.py": "x\n", "empty.py": "\n",
        "_sysconfigdata__linux.py": "x\n", "config-3/c.py": "x\n", "notes.txt": "x\n",
    }  # fmt: skip
    for name, text in (kept | left_out).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "latin.py").write_bytes("# é\n".encode("latin-1"))
    documents = prepare.read_library(tmp_path)
    assert [document["path"] for document in documents] == ["a/a.py", "a/z.py", "b.py"]
    assert documents[2]["text"] == "b = 1\n"
    with pytest.raises(SystemExit, match="no Python source in"):
        prepare.read_library(tmp_path / "notes.txt")


@settings(max_examples=50, deadline=None)
@given(text=st.text())
def test_tokenizer_round_trips_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_tokenizer_knows_every_byte_and_its_special_tokens(prepared, tokenizer):
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(tokenizer.get_vocab())
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    config = json.loads((prepared / "base" / "tokenizer_config.json").read_text())
    special = [config["eos_token"], config["pad_token"], *config["additional_special_tokens"]]
    assert [tokenizer.encode(token).ids for token in special] == [[0], [1], [2], [3]]
    with pytest.raises(SystemExit, match="260 is the least"):
        prepare.train_tokenizer(["x"], vocab_size=100)


def slow_ngram_nats(train, held_out, vocab_size):
    """The two tables by the book, one token at a time."""
    counts, follow = Counter(), defaultdict(Counter)
    for document in train:
        for a, b in pairwise(document):
            counts[b] += 1
            follow[a][b] += 1
    total = sum(counts.values())
    rows = []
    for document in held_out:
        one, two = 0.0, 0.0
        for a, b in pairwise(document):
            p1 = (counts[b] + 1) / (total + vocab_size)
            seen, kinds = sum(follow[a].values()), len(follow[a])
            p2 = (follow[a][b] + kinds * p1) / (seen + kinds) if seen else p1
            one, two = one - math.log(p1), two - math.log(p2)
        rows.append({"unigram_nats": one, "bigram_nats": two})
    return rows


def test_ngram_losses_equal_a_slow_computation():
    train = [[1, 2, 3, 1, 2, 2, 0], [2, 3, 3, 1, 2, 0]]
    held_out = [[1, 2, 3, 0], [4, 1, 5, 3, 3, 0]]  # 4 and 5 are new, so is the pair (1, 5)
    fast = prepare.ngram_nats(
        [torch.tensor(row) for row in train], [torch.tensor(row) for row in held_out], vocab_size=6
    )
    for row, wanted in zip(fast, slow_ngram_nats(train, held_out, 6), strict=True):
        assert row == pytest.approx(wanted, rel=1e-12)


def test_ngram_tables_are_distributions():
    train = [torch.tensor([1, 2, 3, 1, 2, 2, 0])]
    for before in range(5):
        rows = prepare.ngram_nats(
            train, [torch.tensor([before, after]) for after in range(5)], vocab_size=5
        )
        for name in ("unigram_nats", "bigram_nats"):
            assert sum(math.exp(-row[name]) for row in rows) == pytest.approx(1)


def test_ngrams_of_the_prepared_text(prepared, tokenizer):
    ngrams = json.loads((prepared / "ngrams.json").read_text())
    texts = [row["text"] for row in read_lines(prepared / "heldout.jsonl")]
    assert ngrams["tokens"] == sum(len(tokenizer.encode(text).ids) for text in texts)
    assert ngrams["bytes"] == sum(len(text.encode()) for text in texts)
    assert ngrams["bigram"]["nats_per_token"] < ngrams["unigram"]["nats_per_token"]
    assert ngrams["unigram"]["nats_per_token"] < math.log(VOCAB_SIZE)


def test_second_run_does_nothing_unless_a_file_was_damaged(prepared, capsys):
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    assert not prepare.prepare(prepared, **ARGUMENTS)
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == before
    arguments = json.loads((prepared / prepare.MANIFEST).read_text())["arguments"]
    assert not prepare.is_intact(prepared, arguments | {"seed": 4})
    whole = (prepared / "heldout.jsonl").read_bytes()
    (prepared / "heldout.jsonl").write_bytes(whole[:-1])
    assert not prepare.is_intact(prepared, arguments)
    (prepared / "heldout.jsonl").write_bytes(whole)
    assert prepare.is_intact(prepared, arguments)


def test_transformers_reads_the_base_folder_and_agrees(prepared, base, tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reference, info = AutoModelForCausalLM.from_pretrained(
        prepared / "base", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    text = read_lines(prepared / "heldout.jsonl")[0]["text"][:700]
    theirs = AutoTokenizer.from_pretrained(prepared / "base")
    ids = torch.tensor(tokenizer.encode(text).ids)
    assert theirs(text)["input_ids"] == ids.tolist()
    chat = theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"
    with torch.no_grad():
        wanted = reference(ids[None], labels=ids[None]).loss
    nats, tokens = report.held_out_loss(base, [ids], window=len(ids))
    assert tokens == len(ids) - 1
    assert nats / tokens == pytest.approx(float(wanted), abs=1e-4)


def test_windows_predict_each_token_once():
    documents = [torch.arange(10), torch.arange(20, 24), torch.tensor([30, 31])]
    pieces = report.cut_windows(documents, 4)
    assert [piece.tolist() for piece in pieces] == [
        [0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [20, 21, 22, 23], [8, 9], [30, 31],
    ]  # fmt: skip


def test_padding_and_batches_change_nothing(base):
    documents = [torch.arange(4, 40), torch.arange(50, 61), torch.arange(70, 73)]
    together = report.evaluate(base, documents, 16)
    alone = [report.evaluate(base, [document], 16, batch_size=1) for document in documents]
    assert together.nats == pytest.approx(sum(result.nats for result in alone), rel=1e-5)
    assert together.tokens == 35 + 10 + 2
    for layer, counts in together.load.items():
        assert counts.sum() == 2 * together.tokens  # two experts a token, none for padding
        assert torch.equal(counts, sum(result.load[layer] for result in alone))


def test_silencing_experts_is_undone(base):
    documents = [torch.arange(4, 40)]
    before, _ = report.held_out_loss(base, documents)
    with report.experts_silenced(base):
        silent, _ = report.held_out_loss(base, documents)
    after, _ = report.held_out_loss(base, documents)
    assert silent != before
    assert after == before


def run_report(monkeypatch, prepared, tuned, out):
    arguments = {
        "--base": prepared / "base", "--tuned": tuned, "--data": prepared, "--out": out,
        "--max-tokens": 1000,
    }  # fmt: skip
    words = [str(word) for pair in arguments.items() for word in pair]
    monkeypatch.setattr("sys.argv", ["report.py", *words])
    report.main()


def test_report_of_the_base_against_itself(prepared, tmp_path, monkeypatch, capsys):
    run_report(monkeypatch, prepared, prepared / "base", tmp_path)
    printed = capsys.readouterr().out
    assert "experts silenced" in printed
    assert report.PROMPT in printed
    numbers = json.loads((tmp_path / "report.json").read_text())
    losses, held_out = numbers["losses"], numbers["held_out"]
    assert losses["tuned"] == losses["base"]
    assert losses["base"]["nats_per_token"] == pytest.approx(math.log(VOCAB_SIZE), abs=0.3)
    assert held_out["modules"] == 1
    first = json.loads((prepared / "ngrams.json").read_text())["documents"][0]
    assert losses["bigram"]["nats_per_byte"] == pytest.approx(first["bigram_nats"] / first["bytes"])
    assert list(numbers["load"]["tuned"]) == [f"layers.{n}.mlp" for n in range(4)]
    assert (tmp_path / "expert_load.png").read_bytes().startswith(b"\x89PNG")


def test_report_names_what_is_missing(prepared, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="train first"):
        run_report(monkeypatch, prepared, tmp_path / "nowhere", tmp_path)
    with pytest.raises(SystemExit, match=r"run prepare.py first: python examples/python_stdlib/"):
        run_report(monkeypatch, tmp_path, tmp_path, tmp_path)


def test_report_refuses_counts_of_another_tokenizer(prepared, tokenizer, tmp_path):
    shutil.copy(prepared / "heldout.jsonl", tmp_path)
    ngrams = json.loads((prepared / "ngrams.json").read_text())
    ngrams["documents"][0]["tokens"] += 1
    (tmp_path / "ngrams.json").write_text(json.dumps(ngrams))
    with pytest.raises(ValueError, match="this tokenizer makes"):
        report.read_documents(tmp_path, tokenizer)
