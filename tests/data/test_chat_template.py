"""Chat templates: rendered like transformers, and trained on exactly what the assistant says."""

import pytest
import transformers
from helpers_data import BLOCKS, CHATML, GLM, INST, LLAMA, QUOTING, QWEN, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from torchtune.data import Message

from moe_builders.data.tokenizer import HFTokenizer
from moe_builders.errors import InputError

TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "inst": INST, "qwen": QWEN, "glm": GLM,
             "blocks": BLOCKS}  # fmt: skip
ONE = [("user", "What is two?"), ("assistant", "It is 2.")]
SYSTEM = [("system", "Be brief."), *ONE]
MULTI = [*SYSTEM, ("user", "And three?"), ("assistant", "Yes.\n\nThree."), ("user", "Hm"),
         ("assistant", "def add(a, b):\n    return a + b")]  # fmt: skip
WORDS = [("system", "assistant"), ("user", "assistant"), ("assistant", "user"),
         ("user", "user\nassistant"), ("assistant", "assistant")]  # fmt: skip
UNICODE = [("user", "é🙂 ẞ 漢字"), ("assistant", "👩‍👩‍👧 naïve 漢字🙂"), ("user", "e\u0301"),
           ("assistant", "🙂")]  # fmt: skip
SPACES = [("user", "  a \n"), ("assistant", "\n\n  b \n"), ("user", "\tc"), ("assistant", " ")]
EDGES = [("user", "a"), ("assistant", "\n b \n")]
EMPTY = [("user", ""), ("assistant", "")]
CHATS = {"one": ONE, "system": SYSTEM, "multi": MULTI, "words": WORDS, "unicode": UNICODE,
         "spaces": SPACES, "edges": EDGES, "empty": EMPTY}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        name: write_tokenizer(tmp_path_factory.mktemp(name), template=template)
        for name, template in TEMPLATES.items()
    }


@pytest.fixture(scope="module")
def tokenizers(folders):
    return {name: HFTokenizer(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def references(folders):
    return {name: transformers.AutoTokenizer.from_pretrained(f) for name, f in folders.items()}


def as_messages(chat, train_on_input=False):
    return [Message(role=r, content=c, masked=not train_on_input and r != "assistant")
            for r, c in chat]  # fmt: skip


def trained_text(tokenizer, chat, **options):
    tokens, mask = tokenizer.tokenize_messages(as_messages(chat, **options))
    kept = [token for token, hidden in zip(tokens, mask, strict=True) if not hidden]
    return tokenizer.decode(kept, skip_special_tokens=False)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_rendered_and_tokenized_as_transformers_does(tokenizers, references, name, chat):
    ours, theirs = tokenizers[name], references[name]
    messages = [{"role": r, "content": c} for r, c in CHATS[chat]]
    for prompt in (False, True):
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert ours.render(messages, add_generation_prompt=prompt) == text
    ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ours.tokenize_messages(as_messages(CHATS[chat]))[0] == ids


def answers(chat):
    return [content for role, content in chat if role == "assistant"]


WANTED = {  # what a template leaves of the answers, with what ends each
    "chatml": lambda texts: "".join(f"{t}<|im_end|>" for t in texts),
    "llama": lambda texts: "".join(f"{t.strip()}<|im_end|>" for t in texts),
    "qwen": lambda texts: "".join(f"{t}<|im_end|>" for t in [*texts[:-1], texts[-1].lstrip("\n")]),
    # the space before an answer's first word is one token with it, or one of its own
    "inst": lambda texts: "".join(f"{t.strip()} <|eos|>" for t in texts),
    "blocks": lambda texts: "".join(f"{t}<|im_end|>" for t in texts),
    # the next turn's token ends an answer
    "glm": lambda texts: "<|user|>".join(texts),
}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_exactly_the_answers_are_trained_on(tokenizers, name, chat):
    text = trained_text(tokenizers[name], CHATS[chat])
    wanted = WANTED[name](answers(CHATS[chat]))
    if name == "inst":
        assert text.replace("<|eos|> ", "<|eos|>").removeprefix(" ") == wanted
    else:
        assert text == wanted


contents = st.text(
    st.characters(exclude_categories=["Cs", "Co"]) | st.sampled_from(list("user \nasistant")),
    max_size=12,
).filter(lambda text: "<|" not in text)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(pairs=st.lists(st.tuples(contents, contents), min_size=1, max_size=3))
def test_any_contents(tokenizers, pairs):
    chat = [turn for q, a in pairs for turn in (("user", q), ("assistant", a))]
    for name in ("chatml", "llama"):
        # a character of several tokens comes back whole only if all of them are trained on
        assert trained_text(tokenizers[name], chat) == WANTED[name](answers(chat))


def test_train_on_input_trains_on_every_content_but_not_on_the_template(tokenizers):
    text = trained_text(tokenizers["chatml"], SYSTEM, train_on_input=True)
    assert text == "Be brief.<|im_end|>What is two?<|im_end|>It is 2.<|im_end|>"


def test_a_token_across_the_border_belongs_to_the_answer(tokenizers):
    """' It' is one token: its space is the template's."""
    assert trained_text(tokenizers["inst"], ONE).startswith(" It")


def test_trimmed_offsets_hide_no_white_space(tmp_path):
    """GPT-2's post-processor cuts spaces out of the offsets that the mask is made from."""
    from tokenizers import processors

    def change(tokenizer):
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)

    trimmed = HFTokenizer(write_tokenizer(tmp_path, template=CHATML, change=change))
    for chat in (MULTI, UNICODE, SPACES):
        assert trained_text(trimmed, chat) == WANTED["chatml"](answers(chat))


def test_a_null_bos_is_nothing_to_a_template(tmp_path):
    """Not "None", as python would write it."""
    folder = write_tokenizer(tmp_path, template="{{ bos_token }}" + CHATML, bos_token=None)
    messages = [{"role": r, "content": c} for r, c in ONE]
    text = HFTokenizer(folder).render(messages)
    assert "None" not in text
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    assert text == reference.apply_chat_template(messages, tokenize=False)


def test_where_a_template_stands(tmp_path):
    names = [{"name": "tools", "template": "no"}, {"name": "default", "template": CHATML}]
    listed = write_tokenizer(tmp_path / "list", template=names)
    assert HFTokenizer(listed).chat_template == CHATML
    (listed / "chat_template.jinja").write_text("🙂" + CHATML, encoding="utf-8")
    assert HFTokenizer(listed).chat_template == "🙂" + CHATML, "the file wins"
    assert trained_text(HFTokenizer(listed), ONE) == "It is 2.<|im_end|>"
    only_tools = write_tokenizer(tmp_path / "tools", template=names[:1])
    assert HFTokenizer(only_tools).chat_template is None


REFUSED = {
    "none": (None, ONE, "the tokenizer's folder has no chat template"),
    "quoting": (
        QUOTING,
        [("user", "a"), ("assistant", 'a "b"')],
        "changes the contents of messages",
    ),
    "upper": ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", ONE, "changes the"),
    "added": (
        "{{ messages[1].content }}{% if '2' in messages[1].content %}!{% endif %}",
        ONE,
        "changes the contents",
    ),
    "thought": (QWEN, [("user", "a"), ("assistant", "<think>\nb\n</think>\n\nc")], "changes the"),
    "dropped": ("{{ messages[0].content }}", ONE, "leaves a message of 'assistant' out"),
    "roles": (INST, ONE[::-1], "refuses this conversation: roles must$"),
    "syntax": ("{% for %}", ONE, "the chat template is broken at its line 1: Expected"),
    "undefined": ("{{ messages[0].a.b }}", ONE, "refuses this conversation: .* no attribute 'a'"),
    "type": ("{{ 1 + messages[0].content }}", ONE, "refuses this conversation: unsupported"),
    "sandbox": ("{{ messages.__class__.__mro__ }}", ONE, "refuses this conversation: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_on_is_refused_in_one_sentence(tmp_path, case):
    template, chat, message = REFUSED[case]
    tokenizer = HFTokenizer(write_tokenizer(tmp_path, template=template))
    with pytest.raises(InputError, match=message) as caught:
        tokenizer.tokenize_messages(as_messages(chat))
    assert "\n" not in str(caught.value)


def test_a_dropped_message_that_is_not_trained_on_is_the_templates_affair(tokenizers):
    assert trained_text(tokenizers["glm"], [("system", "x"), *ONE]) == "It is 2."
    with pytest.raises(InputError, match="leaves a message of 'system' out"):
        trained_text(tokenizers["glm"], [("system", "x"), *ONE], train_on_input=True)


def test_images_are_refused(tokenizers):
    image = Message(role="user", content=[{"type": "image", "content": object()}])
    with pytest.raises(InputError, match="only text can be trained on"):
        tokenizers["chatml"].tokenize_messages([image])
