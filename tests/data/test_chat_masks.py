"""Trained on is exactly what transformers marks as the assistant's, family by family.

Each template here has {% generation %} around an answer and what ends it, and is written in the
shape of a family. transformers reads the tags; we render the same template without its tags, as
the families' own come, and must find the same tokens by looking.
"""

import re

import pytest
import transformers
from helpers_data import write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torchtune.data import Message

from moe_builders.data import chat_template
from moe_builders.data.tokenizer import HFTokenizer

START, END = "{% generation %}", "{% endgeneration %}"
QWEN = (
    "{% if messages[0].role != 'system' %}"
    r"{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    r"{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}"
    + START + "{{ message.content + '<|im_end|>' }}" + END +
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}"
    r"{{ '\n' }}{% endfor %}"
)  # fmt: skip
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    r"{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['role'] == 'assistant' %}"
    + START + "{{ message['content'] | trim + '<|eot_id|>' }}" + END +
    "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
)  # fmt: skip
# the system prompt inside the first question; ~: a space or nothing
MISTRAL = (
    r"{% set ns = namespace(system='') %}{{ bos_token }}{% for message in messages %}"
    r"{% if message.role == 'system' %}{% set ns.system = message.content + '\n\n' %}"
    "{% elif message.role == 'user' %}"
    "{{ '[INST]~' + ns.system + message.content + '~[/INST]' }}{% set ns.system = '' %}"
    "{% else %}{{ '~' }}" + START + "{{ message.content + eos_token }}" + END +
    "{% endif %}{% endfor %}"
)  # fmt: skip
CHATML = (
    "{%- for message in messages %}\n"
    r"    {{- '<|im_start|>' ~ message['role'] ~ '\n' }}" "\n"
    "    {%- if message['role'] == 'assistant' %}\n"
    "        {%- generation %}{{- message['content'] ~ '<|im_end|>' }}{% endgeneration -%}\n"
    "    {%- else %}{{- message['content'] ~ '<|im_end|>' }}{% endif %}\n"
    r"    {{- '\n' }}" "\n"
    "{%- endfor %}"
)  # fmt: skip
# an end token that is no special one's neighbour: white space stands between
SPACED_END = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    r"{{ 'A: ' }}" + START + r"{{ message.content + ' </s>' }}" + END + r"{{ '\n' }}"
    r"{% else %}{{ 'Q: ' + message.content + '\n' }}{% endif %}{% endfor %}"
)  # fmt: skip
TEMPLATES = {
    "qwen": QWEN, "llama3": LLAMA3, "mistral": MISTRAL.replace("~", ""),
    "mistral with spaces": MISTRAL.replace("~", " "), "chatml": CHATML, "spaced end": SPACED_END,
}  # fmt: skip
MORE_TOKENS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
               "[INST]", "[/INST]", "<s>"]  # fmt: skip
BOS = {"llama3": "<|begin_of_text|>", "mistral": "<s>", "mistral with spaces": "<s>"}

ONE = [("user", "What is two?"), ("assistant", "It is 2.")]
CHATS = {
    "one": ONE,
    "system": [("system", "Be brief."), *ONE],
    "many turns": [("system", "Be brief."), *ONE, ("user", "And three?"), ("assistant", "Yes.")]
    + ONE * 3,
    "the same again": [*ONE, *ONE],
    "answers that are questions": [("user", "Hi"), ("assistant", "Hi"), ("user", "Hi"),
                                   ("assistant", "Hi")],
    "empty": [("user", ""), ("assistant", ""), ("user", "a"), ("assistant", "")],
    "blank": [("user", " "), ("assistant", "x"), ("user", "\n"), ("assistant", "y")],
    "spaces around": [("user", "  a "), ("assistant", "  b "), ("user", "c"), ("assistant", "d ")],
    "line ends around": [("user", "\na\n\n"), ("assistant", "\n\nb\n"), ("user", "c\n"),
                         ("assistant", "d\n\n")],
    "tabs": [("user", "\ta"), ("assistant", "\tb\r\n")],
    "unicode": [("user", "é🙂 漢字"), ("assistant", "👩‍👩‍👧 naïve 漢字🙂"), ("user", "e\u0301"),
                ("assistant", "🙂")],
    "roles as words": [("user", "assistant"), ("assistant", "user\nassistant"),
                       ("user", "assistant\n"), ("assistant", "system")],
    "markers in the question": [
        ("user", "<|im_end|>\n<|im_start|>assistant\nI<|eot_id|> [/INST] </s>"), ("assistant", "x")
    ],
    "markers in the answer": [
        ("user", "q"), ("assistant", "a<|im_end|>\n<|im_start|>user\nb [INST] c [/INST]<|eot_id|>")
    ],
    "jinja in contents": [("user", "{{ bos_token }} {% generation %}"),
                          ("assistant", "{% endfor %} {{ x }} {# y #}")],
    "one after the other": [("user", "a"), ("user", "b"), ("assistant", "c"), ("assistant", "d"),
                            ("user", "e"), ("assistant", "f")],
    "the assistant begins": [("assistant", "Welcome."), ("user", "a"), ("assistant", "b")],
    "no answer": [("user", "a"), ("user", "b")],
    "code": [("user", "add?"), ("assistant", "def add(a, b):\n    return a + b\n\n\n# done\n")],
}  # fmt: skip


def add_tokens(tokenizer):
    tokenizer.add_special_tokens(MORE_TOKENS)


def sentencepiece(tokenizer):
    """A vocabulary as SentencePiece makes them: ▁ for spaces, bytes for what is unknown."""
    other = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    other.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    other.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", *(f"<0x{n:02X}>" for n in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    other.train_from_iterator(["What is two and two? It is 4. def add(a, b): return"] * 9, trainer)
    known = [t.content for t in tokenizer.get_added_tokens_decoder().values()]
    values = other.to_str().replace('"special":true', '"special":false')
    tokenizer.__setstate__(Tokenizer.from_str(values).__getstate__())
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in known + MORE_TOKENS])


VOCABULARIES = {"bytes": add_tokens, "sentencepiece": sentencepiece}


@pytest.fixture(scope="module", params=VOCABULARIES)
def pairs(request, tmp_path_factory):
    """{template: (ours without tags, transformers' with tags)}."""
    found = {}
    for name, template in TEMPLATES.items():
        end = {"mistral": "</s>", "mistral with spaces": "</s>"}.get(name, "<|eos|>")
        made = {}
        for kind, text in (("theirs", template), ("ours", without_tags(template))):
            made[kind] = write_tokenizer(
                tmp_path_factory.mktemp(kind), template=text, eos_token=end,
                change=VOCABULARIES[request.param], bos_token=BOS.get(name, "<|bos|>"),
            )  # fmt: skip
        reference = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(made["theirs"] / "tokenizer.json"), bos_token=BOS.get(name),
            eos_token=end, chat_template=template, clean_up_tokenization_spaces=False,
        )  # fmt: skip
        found[name] = HFTokenizer(made["ours"]), reference
    return found


def without_tags(template):
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)


def ours_and_theirs(pair, chat):
    """((tokens, trained on), the same of transformers)."""
    ours, reference = pair
    messages = [Message(role=r, content=c, masked=r != "assistant") for r, c in chat]
    tokens, mask = ours.tokenize_messages(messages)
    wanted = reference.apply_chat_template(
        [{"role": r, "content": c} for r, c in chat],
        tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
    )  # fmt: skip
    return (tokens, [not hidden for hidden in mask]), (
        list(wanted["input_ids"]),
        [bool(trained) for trained in wanted["assistant_masks"]],
    )


def test_the_templates_differ_by_their_tags_alone():
    for template in TEMPLATES.values():
        assert template.count("endgeneration") == 1
        assert "generation" not in without_tags(template)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_and_mask_are_transformers(pairs, name, chat):
    (tokens, trained), (wanted_tokens, wanted) = ours_and_theirs(pairs[name], CHATS[chat])
    assert tokens == wanted_tokens
    answers = sum(role == "assistant" for role, _ in CHATS[chat])
    assert sum(trained) >= answers, "each is at least ended"
    assert trained == wanted


characters = st.characters(exclude_categories=["Cs", "Co"]) | st.sampled_from(list(" \n\tab?é🙂"))
pieces = st.text(characters, max_size=6) | st.sampled_from([
    "<|im_end|>", "<|im_start|>assistant\n", "[INST]", "[/INST]", "</s>", "<|eot_id|>", "user\n",
    "A: ", "Q: ", "You are a helpful assistant.", "  ", "\n\n",
])  # fmt: skip
contents = st.lists(pieces, max_size=4).map("".join)
roles = st.sampled_from(["user", "assistant", "assistant", "system"])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(chat=st.lists(st.tuples(roles, contents), min_size=1, max_size=5))
def test_any_chat_has_transformers_tokens_and_mask(pairs, chat):
    for name in TEMPLATES:
        if name.startswith("mistral") and chat[-1][0] == "system":
            continue  # shown with the next question, of which there is none
        ours, theirs = ours_and_theirs(pairs[name], chat)
        assert ours == theirs, name


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_message_stands_there_once(pairs, name):
    words = [f"w{number}w" for number in range(40)]
    chat = [("system", "first"), *zip(["user", "assistant"] * 20, words, strict=True)]
    ours, _ = pairs[name]
    messages = [Message(role=r, content=c, masked=r != "assistant") for r, c in chat]
    tokens, mask = ours.tokenize_messages(messages)
    text = ours.decode(tokens, skip_special_tokens=False)
    assert [text.count(word) for word in ["first", *words]] == [1] * 41
    kept = [token for token, hidden in zip(tokens, mask, strict=True) if not hidden]
    answers = ours.decode(kept, skip_special_tokens=False)
    assert [answers.count(word) for word in words] == [0, 1] * 20


@pytest.mark.parametrize("turns", [1, 30])
def test_a_conversation_is_rendered_whole_however_long(pairs, monkeypatch, turns):
    """Once for its text and once for the places; never message by message."""
    lengths, render = [], chat_template.render

    def counted(template, messages, **kwargs):
        lengths.append(len(messages))
        return render(template, messages, **kwargs)

    monkeypatch.setattr(chat_template, "render", counted)
    ours_and_theirs(pairs["chatml"], ONE * turns)
    assert lengths == [2 * turns] * 2


def test_the_vocabularies_are_what_they_are_called(pairs):
    tokenizer = pairs["chatml"][0].tokenizer
    pieces = tokenizer.encode("What is 漢?", add_special_tokens=False).tokens
    if any(piece.startswith("▁") for piece in pieces):
        assert "<0xE6>" in pieces
    else:
        assert any(piece.startswith("Ġ") for piece in pieces)
