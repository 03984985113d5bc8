"""A config's ``dataset``: torchtune's builders with our packing; what is wrong is one sentence."""

import pytest
from helpers_data import CHATML, chat_node, text_node, write_jsonl, write_tokenizer

from moe_builders.data.datasets import build_dataset
from moe_builders.data.rows import PackedDataset, ShiftedDataset
from moe_builders.data.tokenizer import HFTokenizer
from moe_builders.errors import InputError

TEXTS = ["a b c d e f g h i j k l m n", "o p", "q r s t u v w x y z"]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return HFTokenizer(write_tokenizer(tmp_path_factory.mktemp("tok"), template=CHATML))


@pytest.fixture
def texts(tmp_path):
    return write_jsonl(tmp_path / "texts.jsonl", [{"text": t, "n": 1} for t in TEXTS])


@pytest.fixture
def chats(tmp_path):
    return write_jsonl(tmp_path / "chats.jsonl", [{"messages": CHAT}] * 3)


def tokens_of(dataset):
    rows = [dataset[i]["tokens"] for i in range(len(dataset))]
    return [row if isinstance(row, list) else row.tolist() for row in rows]


def test_text_is_cut_unless_it_is_split_across_rows(tokenizer, texts):
    whole = [tokenizer.encode(t) for t in TEXTS]
    assert max(map(len, whole)) > 20
    rows = build_dataset(text_node(texts), tokenizer, max_seq_len=20)
    assert isinstance(rows, ShiftedDataset)
    assert tokens_of(rows) == [tokens[:20] for tokens in whole], "and not at 19, as torchtune does"
    kept = build_dataset(text_node(texts, packed=True, split_across_pack=False), tokenizer,
                         max_seq_len=20)  # fmt: skip
    assert isinstance(kept, PackedDataset)
    assert [t for row in tokens_of(kept) for t in row] == [t for d in whole for t in d[:20]]
    split = build_dataset(text_node(texts, packed=True, split_across_pack=True), tokenizer,
                          max_seq_len=20)  # fmt: skip
    assert [t for row in tokens_of(split) for t in row] == [t for d in whole for t in d]


def test_what_is_left_out_is_as_in_torchtune(tokenizer, texts, chats):
    """text_completion_dataset splits unless told otherwise; chats stay in one piece."""
    node = text_node(texts, packed=True)
    split = build_dataset(node | {"split_across_pack": True}, tokenizer, max_seq_len=20)
    assert tokens_of(build_dataset(node, tokenizer, max_seq_len=20)) == tokens_of(split)
    packed = build_dataset(chat_node(chats, packed=True), tokenizer, max_seq_len=70)
    assert all(len(set(row["lengths"])) == 1 for row in packed.rows), "none is split"
    assert isinstance(build_dataset(text_node(texts), tokenizer, max_seq_len=20), ShiftedDataset)


def test_a_second_data_set_does_not_change_the_first(tokenizer, texts):
    """Both are made from one tokenizer, which carries the length that samples are cut at."""
    first = build_dataset(text_node(texts), tokenizer, max_seq_len=20)
    before = tokens_of(first)
    build_dataset(text_node(texts, packed=True), tokenizer, max_seq_len=20)
    build_dataset(text_node(texts), tokenizer, max_seq_len=5)
    assert tokens_of(first) == before
    assert tokenizer.max_seq_len is None


def test_a_smaller_limit_of_the_tokenizer_is_not_dropped_silently(tokenizer, texts):
    """torchtune's configs have it there."""
    own = HFTokenizer.__new__(HFTokenizer)
    own.__dict__ = dict(tokenizer.__dict__) | {"max_seq_len": 10}
    with pytest.raises(InputError, match=r"tokenizer.max_seq_len is 10, but samples are cut at ma"):
        build_dataset(text_node(texts), own, max_seq_len=20)
    assert len(build_dataset(text_node(texts), own, max_seq_len=10)[0]["tokens"]) == 10
    assert own.max_seq_len == 10


def test_a_list_is_one_after_the_other(tokenizer, texts, chats):
    alone = [build_dataset(n, tokenizer, max_seq_len=64) for n in (text_node(texts),
                                                                   chat_node(chats))]  # fmt: skip
    both = build_dataset([text_node(texts), chat_node(chats)], tokenizer, max_seq_len=64)
    assert tokens_of(both) == [row for dataset in alone for row in tokens_of(dataset)]
    one = build_dataset([text_node(texts)], tokenizer, max_seq_len=64)
    assert tokens_of(one) == tokens_of(alone[0])
    node = {"packed": True, "split_across_pack": False}
    packed = build_dataset([text_node(texts, **node), chat_node(chats, packed=True)], tokenizer,
                           max_seq_len=64)  # fmt: skip
    flat = [t for row in tokens_of(packed) for t in row]
    assert flat == [t for row in tokens_of(both) for t in row]


def test_split_across_pack_means_nothing_without_packing(tokenizer, texts):
    nodes = [text_node(texts, split_across_pack=True), text_node(texts, split_across_pack=False)]
    assert len(build_dataset(nodes, tokenizer, max_seq_len=64)) == 6


BAD = {
    "null": (lambda f: None, "dataset must be a component"),
    "word": (lambda f: "torchtune.datasets.text_completion_dataset", "dataset must be a component"),
    "empty list": (lambda f: [], "dataset must be a component"),
    "no component": (lambda f: {"source": "json"}, "dataset needs a _component_"),
    "unknown component": (lambda f: text_node(f, _component_="torchtune.datasets.text_dataset"),
                          "dataset._component_ is .*torchtune.datasets has no 'text_dataset'"),
    "packed by word": (lambda f: text_node(f, packed="yes please"),
                       "dataset.packed is 'yes please', but must be true or false"),
    "disagreement": (lambda f: [text_node(f, packed=True), text_node(f)],
                     "dataset: all data sets of a list must agree on packed, split_across_pack"),
    "in a list": (lambda f: [text_node(f), text_node(f, column="txt")],
                  r"dataset\[1\]: sample 0 has no 'txt'; its columns are text, n"),
    "missing file": (lambda f: text_node(f"{f}.old"), "cannot be built from .*jsonl.old: Unable"),
    "missing column": (lambda f: text_node(f, column="txt"),
                       "dataset: sample 0 has no 'txt'; its columns are text, n"),
    "unknown option": (lambda f: text_node(f, col="text"), "dataset.* 'col'"),
    "unknown split": (lambda f: text_node(f, split="tranche"), 'dataset: .*"tranche"'),
    "empty split": (lambda f: text_node(f, split="train[:0]"),
                    "dataset holds no samples in .*texts.jsonl"),
    "wrong type": (lambda f: text_node(f, column=3), "dataset.column is 3, but must be a string"),
    "numbers for text": (lambda f: text_node(f, column="n"), "sample 0: its text is 1, but must"),
    "not a chat": (lambda f: chat_node(f), "dataset: sample 0 has no 'messages'"),
    "style": (lambda f: chat_node(f, conversation_style="xml"),
              "dataset: chat_dataset: Unsupported conversation style: xml"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_nodes_are_one_sentence(tokenizer, texts, case):
    node, message = BAD[case]
    with pytest.raises(InputError, match=message) as caught:
        build_dataset(node(texts), tokenizer, max_seq_len=64)
    assert "\n" not in str(caught.value)


FILES = {
    "empty": (b"", "dataset holds no samples in .*bad.jsonl"),
    "blank lines": (b"\n\n\n", "dataset holds no samples in .*bad.jsonl"),
    "not json": (b"hello\n", "built from .*bad.jsonl: line 1 is not JSON"),
    "cut short": (
        b'{"text": "a"}\n{"text": ',
        "cannot be built from .*bad.jsonl: line 2 is not JSON",
    ),
    "null text": (b'{"text": null}\n{"text": "a"}\n', "dataset: sample 0: its text is null, but"),
    "not utf-8": (b'{"text": "\xff\xfe"}\n', "dataset: sample 0 cannot be used: .utf-8"),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_files_are_one_sentence(tokenizer, tmp_path, case):
    content, message = FILES[case]
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        build_dataset(text_node(tmp_path / "bad.jsonl"), tokenizer, max_seq_len=64)
    assert "\n" not in str(caught.value)


CHATS = {
    "one turn": (CHAT[:1], "Messages must be at least length 2"),
    "two users": ([CHAT[0], CHAT[0], CHAT[1]], "Two consecutive user messages"),
    "no role": (
        [{"content": "a"}, {"content": "b"}],
        "message 0 holds content, but conversation",
    ),
}


@pytest.mark.parametrize("case", CHATS)
def test_bad_chats_are_one_sentence(tokenizer, tmp_path, case):
    messages, message = CHATS[case]
    path = write_jsonl(tmp_path / "bad.jsonl", [{"messages": messages}])
    with pytest.raises(InputError, match=message) as caught:
        build_dataset(chat_node(path), tokenizer, max_seq_len=64)
    assert "\n" not in str(caught.value)


def test_a_later_sample_that_cannot_be_read_names_its_number(tokenizer, tmp_path):
    rows = [{"text": "a"}, {"text": "b"}, {"text": None}]
    path = write_jsonl(tmp_path / "late.jsonl", rows)
    with pytest.raises(InputError, match="dataset: sample 2: its text is null"):
        build_dataset(text_node(path, packed=True), tokenizer, max_seq_len=64)
    late = build_dataset(text_node(path), tokenizer, max_seq_len=64, path="dataset_val")
    with pytest.raises(InputError, match="dataset_val: sample 2: its text is null"):
        late[2]
