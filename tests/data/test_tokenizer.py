"""A folder's tokenizer: ids, special tokens in all spellings, and torchtune's data sets over it."""

import json

import pytest
from helpers_data import (
    BOS,
    CHATML,
    EOS,
    IM_END,
    PAD,
    chat_node,
    text_node,
    write_jsonl,
    write_tokenizer,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st
from torchtune.data import Message

from moe_builders.data.tokenizer import HFTokenizer, load_tokenizer
from moe_builders.errors import InputError
from moe_builders.instantiate import instantiate

CHAT = [{"role": "user", "content": "What is two?"}, {"role": "assistant", "content": "It is 2."}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return HFTokenizer(write_tokenizer(tmp_path_factory.mktemp("tok"), template=CHATML))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(text=st.text())
def test_any_text_comes_back(tokenizer, text):
    plain = tokenizer.encode(text, add_bos=False, add_eos=False)
    assert tokenizer.encode(text) == [BOS, *plain, EOS]
    assert tokenizer.decode(plain, skip_special_tokens=False) == text
    if not any(token in text for token in tokenizer.special_tokens):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_attributes_are_those_torchtune_asks_for(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (BOS, EOS, PAD)
    assert tokenizer.max_seq_len is None
    assert tokenizer.special_tokens["<|im_end|>"] == IM_END
    assert max(tokenizer.tokenizer.get_vocab().values()) == tokenizer.vocab_size - 1
    assert tokenizer.encode("a", add_bos=True, add_eos=False)[0] == BOS


@pytest.mark.parametrize(
    ("config", "generation", "ids"),
    [
        ({"bos_token": {"content": "<|eos|>"}, "pad_token": {"content": "<|eos|>"},
          "eos_token": {"content": "<|im_end|>", "lstrip": True}}, None, (EOS, IM_END, EOS)),
        ({"bos_token": None}, None, (None, EOS, PAD)),
        ({"pad_token": None}, None, (BOS, EOS, EOS)),
        ({"eos_token": None}, {"eos_token_id": IM_END}, (BOS, IM_END, PAD)),
        ({"eos_token": None}, {"eos_token_id": [IM_END, EOS]}, (BOS, IM_END, PAD)),
        ({"eos_token": None}, {"eos_token_id": []}, (BOS, None, PAD)),
        ({"eos_token": "<|eos|>"}, {"eos_token_id": [IM_END]}, (BOS, EOS, PAD)),
        ({"eos_token": None, "pad_token": None}, None, (BOS, None, 0)),
    ],
)  # fmt: skip
def test_special_tokens_in_every_spelling(tmp_path, config, generation, ids):
    found = HFTokenizer(write_tokenizer(tmp_path, generation=generation, **config))
    assert (found.bos_id, found.eos_id, found.pad_id) == ids
    bos, eos, _ = ids
    around = [*([] if bos is None else [bos]), *([] if eos is None else [eos])]
    assert found.encode("") == around


def test_a_bos_that_the_folder_switches_off_is_not_written(tmp_path):
    off = HFTokenizer(write_tokenizer(tmp_path, add_bos_token=False))
    assert off.bos_id == BOS
    assert off.encode("")[0] == EOS


def test_settings_of_somebodys_training_run_are_ignored(tmp_path):
    def change(tokenizer):
        tokenizer.enable_truncation(max_length=3)
        tokenizer.enable_padding(length=50)

    saved = HFTokenizer(write_tokenizer(tmp_path / "a", change=change, template=CHATML))
    fresh = HFTokenizer(write_tokenizer(tmp_path / "b", template=CHATML))
    text = "a rather long text, and the answer"
    assert saved.encode(text) == fresh.encode(text)
    messages = [Message.from_dict(m) for m in CHAT]
    assert saved.tokenize_messages(messages) == fresh.tokenize_messages(messages)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), r"tokenizer.json cannot be read"),
        (lambda f: (f / "tokenizer.json").write_bytes(b"\xff\xfe"), r"tokenizer.json cannot be"),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), r"_config.json is not JSON"),
        (lambda f: (f / "tokenizer_config.json").write_text("[]"), "not a JSON object, but a list"),
        (lambda f: (f / "tokenizer_config.json").write_text('{"bos_token": "<x>"}'),
         r"names '<x>', which tokenizer.json lacks"),
    ],
)  # fmt: skip
def test_a_broken_folder_is_one_sentence(tmp_path, spoil, message):
    folder = write_tokenizer(tmp_path)
    spoil(folder)
    with pytest.raises(InputError, match=message) as caught:
        HFTokenizer(folder)
    assert "\n" not in str(caught.value)


def test_where_the_tokenizer_comes_from(tmp_path):
    folder = str(write_tokenizer(tmp_path / "base", pad_token="<|eos|>"))
    assert load_tokenizer(None, folder).pad_id == EOS
    node = {"_component_": "moe_builders.data.tokenizer.HFTokenizer", "path": folder}
    assert load_tokenizer(node, None).pad_id == EOS
    with pytest.raises(InputError, match="there is no tokenizer: set tokenizer to a component"):
        load_tokenizer(None, None)
    with pytest.raises(InputError, match=r"has no tokenizer.json: .*tokenizer.path"):
        load_tokenizer(None, str(tmp_path))


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_text_completion(tmp_path, tokenizer, suffix):
    texts = ["one line\nand another", "", "é 🙂"]
    rows = [{"text": t, "other": 1} for t in texts]
    path = tmp_path / f"data.{suffix}"
    path.write_text(json.dumps(rows)) if suffix == "json" else write_jsonl(path, rows)
    samples = instantiate(text_node(path), tokenizer, path="dataset")
    assert [samples[i]["tokens"] for i in range(3)] == [tokenizer.encode(t) for t in texts]
    assert samples[0]["labels"] == samples[0]["tokens"]


def test_text_completion_of_a_plain_file(tmp_path, tokenizer):
    (tmp_path / "data.txt").write_text("one line\nand another\n")
    node = text_node(tmp_path / "data.txt", source="text")
    samples = instantiate(node, tokenizer, path="dataset")
    assert [samples[i]["tokens"] for i in range(len(samples))] == [
        tokenizer.encode("one line"), tokenizer.encode("and another"),
    ]  # fmt: skip


@pytest.mark.parametrize("train_on_input", [False, True])
def test_instruct_and_chat_data_agree(tmp_path, tokenizer, train_on_input):
    chat = write_jsonl(tmp_path / "chat.jsonl", [{"messages": CHAT}])
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"q": "What is two?", "a": "It is 2."}])
    turns = [{"from": "human", "value": "What is two?"}, {"from": "gpt", "value": "It is 2."}]
    share = write_jsonl(tmp_path / "share.jsonl", [{"turns": turns}])
    nodes = [
        chat_node(chat, train_on_input=train_on_input),
        chat_node(share, train_on_input=train_on_input, conversation_column="turns",
                  conversation_style="sharegpt"),
        text_node(pairs, _component_="torchtune.datasets.instruct_dataset",
                  train_on_input=train_on_input, column_map={"input": "q", "output": "a"}),
    ]  # fmt: skip
    samples = [instantiate(node, tokenizer, path="dataset")[0] for node in nodes]
    trained = [token for token in samples[0]["labels"] if token != -100]
    both = "What is two?<|im_end|>It is 2.<|im_end|>"
    wanted = both if train_on_input else "It is 2.<|im_end|>"
    assert tokenizer.decode(trained, skip_special_tokens=False) == wanted
    whole = "<|im_start|>user\nWhat is two?<|im_end|>\n<|im_start|>assistant\nIt is 2.<|im_end|>\n"
    assert tokenizer.decode(samples[0]["tokens"], skip_special_tokens=False) == whole
    for sample in samples[1:]:
        assert list(sample["tokens"]) == list(samples[0]["tokens"])
        assert list(sample["labels"]) == list(samples[0]["labels"])


def test_new_system_prompt_of_torchtune(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": CHAT}])
    sample = instantiate(chat_node(path, new_system_prompt="Be brief."), tokenizer, path="d")[0]
    text = tokenizer.decode(sample["tokens"], skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    trained = [token for token in sample["labels"] if token != -100]
    assert tokenizer.decode(trained, skip_special_tokens=False) == "It is 2.<|im_end|>"


@pytest.mark.parametrize("limit", [1, 5, 12, 1000])
def test_tokens_and_mask_are_cut_together(tmp_path, tokenizer, limit):
    messages = [Message.from_dict(m | {"masked": m["role"] == "user"}) for m in CHAT]
    tokens, mask = tokenizer.tokenize_messages(messages)
    short = HFTokenizer(write_tokenizer(tmp_path, template=CHATML), max_seq_len=limit)
    assert short.tokenize_messages(messages) == (tokens[:limit], mask[:limit])
    assert short({"messages": messages, "id": 3}) == {
        "tokens": tokens[:limit], "mask": mask[:limit], "id": 3,
    }  # fmt: skip
