"""Every format that data comes in, to tokens and labels written by hand."""

import gzip
import json

import datasets
import pytest
from helpers_data import (
    CHATML,
    chat_node,
    text_node,
    write_jsonl,
    write_word_tokenizer,
)  # fmt: skip

from moe_builders.data.build import build_loader
from moe_builders.data.loader import Batching
from moe_builders.data.tokenizer import HFTokenizer
from moe_builders.errors import InputError
from moe_builders.losses import IGNORE_INDEX as NO

BOS, EOS, START, END = range(4)
WORDS = ["system", "user", "assistant", "be", "brief", "hi", "there", "two", "four"]
SYSTEM, USER, ASSISTANT, BE, BRIEF, HI, THERE, TWO, FOUR = range(5, 14)
INSTRUCT = "torchtune.datasets.instruct_dataset"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return HFTokenizer(write_word_tokenizer(tmp_path_factory.mktemp("tok"), WORDS))


def rows_of(node, tokenizer, **options):
    """(tokens, labels) of every row, from the sized set; the streamed set must hold the same."""
    found = []
    for streaming in (False, True):
        loader = build_loader(
            node | {"streaming": streaming}, tokenizer,
            Batching(batch_size=1, max_seq_len=64, pad_id=0), validation=True, **options,
        )  # fmt: skip
        found.append([(b.tokens[0].tolist(), b.labels[0].tolist()) for b in loader])
    assert found[0] == found[1]
    return found[0]


TEXTS = [{"text": "hi there", "n": 1}, {"text": "two", "n": 2}]
TEXT_ROWS = [([BOS, HI, THERE, EOS], [HI, THERE, EOS, NO]), ([BOS, TWO, EOS], [TWO, EOS, NO])]


def as_text(path, rows):
    path.write_text("".join(row["text"] + "\n" for row in rows))


def as_array(path, rows):
    path.write_text(json.dumps(rows))


def as_gz(path, rows):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def as_csv(path, rows):
    path.write_text("text,n\n" + "".join(f"{row['text']},{row['n']}\n" for row in rows))


def as_parquet(path, rows):
    datasets.Dataset.from_list(rows).to_parquet(path)


FILES = {
    "texts.jsonl": ("json", write_jsonl), "texts.json": ("json", as_array),
    "texts.txt": ("text", as_text), "texts.jsonl.gz": ("json", as_gz),
    "texts.parquet": ("parquet", as_parquet), "texts.csv": ("csv", as_csv),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_texts(tokenizer, tmp_path, name):
    source, write = FILES[name]
    write(tmp_path / name, TEXTS)
    assert rows_of(text_node(tmp_path / name, source=source), tokenizer) == TEXT_ROWS


@pytest.mark.parametrize("write", [as_parquet, write_jsonl])
def test_a_folder_as_the_hub_has_it(tokenizer, tmp_path, write):
    suffix = "parquet" if write is as_parquet else "jsonl"
    (tmp_path / "org" / "name").mkdir(parents=True)
    for number, row in enumerate(TEXTS):
        write(tmp_path / f"org/name/train-{number}.{suffix}", [row])
    write(tmp_path / f"org/name/test.{suffix}", TEXTS)
    node = text_node("x", source=str(tmp_path / "org/name"))
    del node["data_files"]
    assert rows_of(node, tokenizer) == TEXT_ROWS


def test_text_without_eos_and_packed(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    ((tokens, labels),) = rows_of(text_node(path, packed=True, add_eos=False), tokenizer)
    assert tokens[:5] == [BOS, HI, THERE, BOS, TWO]
    assert labels[:6] == [HI, THERE, NO, TWO, NO, NO]


TURNS = [START, SYSTEM, BE, BRIEF, END, START, USER, HI, END, START, ASSISTANT, HI, THERE, END,
         START, USER, TWO, TWO, END, START, ASSISTANT, FOUR, END]  # fmt: skip
ANSWERS = [NO] * 10 + [HI, THERE, END] + [NO] * 7 + [FOUR, END, NO]
OPENAI = [
    {"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hi there"}, {"role": "user", "content": "two two"},
    {"role": "assistant", "content": "four"},
]  # fmt: skip
NAMES = {"system": "system", "user": "human", "assistant": "gpt"}
SHAREGPT = [{"from": NAMES[m["role"]], "value": m["content"]} for m in OPENAI]
SHAREGPT_KEYS = {"conversation_style": "sharegpt", "conversation_column": "conversations"}


@pytest.mark.parametrize("style", ["openai", "openai parts", "sharegpt"])
@pytest.mark.parametrize("write", [write_jsonl, as_array, as_parquet])
def test_chats(tokenizer, tmp_path, style, write):
    path = tmp_path / "chats.data"
    parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in OPENAI]
    row = {"openai": {"messages": OPENAI}, "openai parts": {"messages": parts},
           "sharegpt": {"conversations": SHAREGPT}}[style]  # fmt: skip
    write(path, [row] * 2)
    keys = SHAREGPT_KEYS if style == "sharegpt" else {}
    node = chat_node(path, source="parquet" if write is as_parquet else "json", **keys)
    assert rows_of(node, tokenizer) == [(TURNS, ANSWERS)] * 2


def test_chats_trained_on_as_a_whole_or_with_another_system_prompt(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": OPENAI[1:3]}])
    ((tokens, labels),) = rows_of(chat_node(path, train_on_input=True), tokenizer)
    assert tokens == TURNS[5:14]
    assert labels == [NO, HI, END, NO, NO, HI, THERE, END, NO], "contents and what ends each"
    ((tokens, labels),) = rows_of(chat_node(path, new_system_prompt="two"), tokenizer)
    assert tokens == [START, SYSTEM, TWO, END, *TURNS[5:14]]
    assert labels == [NO] * 9 + [HI, THERE, END, NO]


@pytest.mark.parametrize("columns", [None, {"input": "question", "output": "reply"}])
@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json", "pairs.parquet", "pairs.csv"])
def test_instructions(tokenizer, tmp_path, columns, name):
    question, reply = (columns or {"input": "input", "output": "output"}).values()
    rows = [{question: "two two", reply: "four"}, {question: "hi", reply: "hi there"}]
    path = tmp_path / name
    if name.endswith("csv"):
        path.write_text(f"{question},{reply}\n" + "".join(
            f"{row[question]},{row[reply]}\n" for row in rows))  # fmt: skip
    else:
        {"jsonl": write_jsonl, "json": as_array, "parquet": as_parquet}[
            name.partition(".")[2]](path, rows)  # fmt: skip
    source = {"parquet": "parquet", "csv": "csv"}.get(name.partition(".")[2], "json")
    node = {"_component_": INSTRUCT, "source": source, "data_files": str(path), "split": "train"}
    if columns:
        node["column_map"] = columns
    assert rows_of(node, tokenizer) == [
        ([START, USER, TWO, TWO, END, START, ASSISTANT, FOUR, END],
         [NO, NO, NO, NO, NO, NO, FOUR, END, NO]),
        ([START, USER, HI, END, START, ASSISTANT, HI, THERE, END],
         [NO, NO, NO, NO, NO, HI, THERE, END, NO]),
    ]  # fmt: skip


def test_a_template_outside_the_folder(tmp_path):
    """As a file, or as text; it wins over the folder's."""
    folder = write_word_tokenizer(tmp_path / "tok", WORDS)
    own = "{% for m in messages %}{{ m.role + ' ' + m.content + '<|im_end|>' }}{% endfor %}"
    (tmp_path / "own.jinja").write_text(own)
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": OPENAI[1:3]}])
    wanted = [([USER, HI, END, ASSISTANT, HI, THERE, END], [NO, NO, NO, HI, THERE, END, NO])]
    for template in (tmp_path / "own.jinja", str(tmp_path / "own.jinja"), own):
        tokenizer = HFTokenizer(folder, chat_template=template)
        assert tokenizer.chat_template == own
        assert rows_of(chat_node(path), tokenizer) == wanted
    assert HFTokenizer(folder).chat_template == CHATML
    with pytest.raises(InputError, match=r"chat_template is 'nowhere.jinja', which is neither a f"):
        HFTokenizer(folder, chat_template="nowhere.jinja")


def test_hub_names_without_a_network(tokenizer):
    node = text_node("x", source="some/corpus")
    del node["data_files"]
    for streaming in (False, True):
        with pytest.raises(InputError, match=(
            r"^dataset.source is 'some/corpus', which is neither a folder here nor can it be "
            r"fetched from the hub: .*: download it where there is a network \(hf download "
            r"some/corpus --repo-type dataset --local-dir FOLDER\) and set source to the folder$"
        )):  # fmt: skip
            build_loader(node | {"streaming": streaming}, tokenizer,
                         Batching(batch_size=1, max_seq_len=8, pad_id=0))  # fmt: skip


def chats(messages):
    return {"messages": messages}


USER_HI = {"role": "user", "content": "hi"}
BAD = {
    "names of ShareGPT": (
        [chats([{"role": "human", "content": "hi"}, {"role": "gpt", "content": "two"}])], {},
        r"^dataset: no token of the first 1 rows is trained on: nobody speaks as 'assistant' in "
        r"these chats, only gpt, human: rename the roles to system, user, assistant$"),
    "cut before the answer": (
        [chats([{"role": "user", "content": "hi " * 9}, {"role": "assistant", "content": "hi"}])],
        {}, r"^dataset: no token of the first 1 rows is trained on: every label is masked, or was "
        r"cut off at max_seq_len \(8\)$"),
    "ShareGPT read as OpenAI": (
        [{"messages": SHAREGPT}], {},
        r"^dataset: sample 0: message 0 holds from, value, but .*: set conversation_style to sha"),
    "OpenAI read as ShareGPT": (
        [chats(OPENAI)], {"conversation_style": "sharegpt"},
        r"^dataset: sample 0 has a message without 'from': conversation_style sharegpt reads "
        r"'from' and 'value', openai reads 'role' and 'content'$"),
    "roles of OpenAI in ShareGPT": (
        [{"conversations": [{"from": "user", "value": "hi"}, {"from": "gpt", "value": "hi"}]}],
        SHAREGPT_KEYS,
        r"^dataset: sample 0 has a message from 'user', but conversation_style sharegpt knows "
        r"system, human, gpt only: rename it$"),
    "no content": (
        [chats([USER_HI, {"role": "assistant", "content": None}])], {},
        r"^dataset: sample 0: message 1 has null for its content, but must hold a text$"),
    "tool calls": (
        [chats([USER_HI, {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}])], {},
        r"^dataset: sample 0: message 1 holds tool_calls, which no chat template gets to see"),
    "not a list": ([chats("hi")], {}, r"^dataset: sample 0 has 'hi' for 'messages', but must hold"),
    "wrong column": ([chats(OPENAI)], {"conversation_column": "chat"},
                     r"^dataset: sample 0 has no 'chat'; its columns are messages$"),
    "wrong column map": ([{"q": "hi", "a": "two"}],
                         {"_component_": INSTRUCT, "conversation_column": ...,
                          "conversation_style": ..., "column_map": {"input": "q"}},
                         r"^dataset: instruct_dataset: Expected a key of 'output' in column_map"),
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_wrong_rows_are_one_sentence(tokenizer, tmp_path, case, streaming):
    rows, changes, says = BAD[case]
    node = chat_node(write_jsonl(tmp_path / "bad.jsonl", rows), streaming=streaming) | changes
    node = {key: value for key, value in node.items() if value is not ...}
    with pytest.raises(InputError, match=says) as caught:
        build_loader(node, tokenizer, Batching(batch_size=1, max_seq_len=8, pad_id=0))
    assert "\n" not in str(caught.value)


def test_a_mistake_in_a_list_is_named_by_its_own_set_and_number(tokenizer, tmp_path):
    good = write_jsonl(tmp_path / "good.jsonl", TEXTS)
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"text": "hi"}, {"text": None}])
    with pytest.raises(InputError, match=r"^dataset\[1\]: sample 1: its text is null"):
        build_loader([text_node(good, packed=True), text_node(bad, packed=True)], tokenizer,
                     Batching(batch_size=1, max_seq_len=8, pad_id=0))  # fmt: skip
