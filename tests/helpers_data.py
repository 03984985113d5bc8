"""Small tokenizer folders, chat templates as families write them, and local data files."""

import json
from pathlib import Path

import datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<|user|>",
           "<|assistant|>", "</s>"]  # fmt: skip
BOS, EOS, PAD, IM_START, IM_END = range(5)
TEXTS = [
    "The user asks the assistant, and the assistant answers the user in a system of words.\n",
    "def add(a, b):\n    return a + b\n\nWhat is two and two? It is four. Hello, how are you?\n",
] * 4

CHATML = (
    "{% for message in messages %}"
    r"{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama 3: begins with bos, trims every content
LLAMA = """{% for message in messages %}
    {%- set content = '<|im_start|>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|im_end|>' %}
    {%- if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
    {{- content }}
{%- endfor %}"""  # noqa: E501
# Llama 2 and Mistral: the system prompt inside the first turn, a space before what ends an answer
INST = """{% if messages[0]['role'] == 'system' %}
    {%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
    {%- set loop_messages = messages[1:] %}
{%- else %}{% set system = '' %}{% set loop_messages = messages %}{% endif %}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must\\nalternate') }}
    {%- endif %}
    {%- set content = (system if loop.first else '') + message['content'] %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + content.strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""
# Qwen 3: an empty thought before the last answer, thoughts of earlier answers taken out
QWEN = """{%- set ns = namespace(last=0) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{% set content = message.content %}{% else %}{% set content = '' %}{% endif %}
    {%- if message.role != 'assistant' %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- else %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""  # noqa: E501
# GLM: nothing ends an answer but the next turn's token; and what else the hub's templates use
GLM = """[{{ bos_token }}{% if tools is not none %}T{% endif %}{{ documents is none }}]
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{% continue %}{% endif %}
    {{- '<|' + message['role'] + '|>\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{ message['content'] }}{% endgeneration %}
    {%- else %}{{ message['content'] }}{% endif %}
{%- endfor %}"""
# relies on what jinja does with lines that hold nothing but a block
BLOCKS = """{% for message in messages %}
    {% if message['role'] == 'assistant' %}
<|assistant|>{{ message['content'] }}<|im_end|>
    {% else %}
<|user|>{{ message['content'] }}
    {% endif %}
{% endfor %}
"""
# writes contents as a program would: what is inside cannot be found again
QUOTING = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | tojson }}<|im_end|>{% endfor %}"
)


def write_tokenizer(folder, *, template=None, generation=None, change=None, **config):
    """A tokenizer folder; ``config`` changes tokenizer_config.json (None is written as null)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS, trainer)
    if change is not None:
        change(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"} | config
    if template is not None:
        values["chat_template"] = template
    values["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def write_word_tokenizer(folder, words, *, template=CHATML):
    """A tokenizer of whole words, so that tokens can be written by hand: word i has id i + 5.

    0 <bos>, 1 <eos>, 2 <|im_start|>, 3 <|im_end|>, 4 anything else.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    special = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<unk>"]
    vocab = {word: number for number, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def write_jsonl(path, rows):
    """One JSON object a line."""
    path = Path(path)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def text_node(path, **changes):
    """A config's text data set."""
    return {"_component_": "torchtune.datasets.text_completion_dataset", "source": "json",
            "data_files": str(path), "split": "train"} | changes  # fmt: skip


def chat_node(path, **changes):
    """A config's chat data set."""
    return {"_component_": "torchtune.datasets.chat_dataset", "source": "json",
            "data_files": str(path), "split": "train", "conversation_column": "messages",
            "conversation_style": "openai"} | changes  # fmt: skip


def isolate_datasets(tmp_path, monkeypatch):
    """Nothing is read from or left in the user's cache, and no progress bar is drawn."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets_cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
