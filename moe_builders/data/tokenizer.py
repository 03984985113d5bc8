"""The tokenizer and chat template of a Hugging Face folder, with torchtune's tokenizer methods.

Letters: n tokens of a sample.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from torchtune.data import Message

from moe_builders.errors import InputError
from moe_builders.instantiate import instantiate


class HFTokenizer:
    """``tokenizer.json`` behind the interface that torchtune's datasets expect.

    Args:
        path: folder with tokenizer.json, and tokenizer_config.json for special tokens and the
            chat template (or chat_template.jinja).
        max_seq_len: samples are cut there; None: never.

    Raises:
        InputError: no tokenizer.json in the folder, or a special token that is not in it.
    """

    def __init__(self, path: str | Path, max_seq_len: int | None = None) -> None:
        folder = Path(path)
        if not (folder / "tokenizer.json").is_file():
            raise InputError(f"{folder} has no tokenizer.json")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        config = _read_json(folder / "tokenizer_config.json")
        generation = _read_json(folder / "generation_config.json")
        self.max_seq_len = max_seq_len
        self.bos_id = self._special_id(config.get("bos_token"))
        eos = self._special_id(config.get("eos_token"))
        if eos is None:  # some folders name it only here; a list means any of them ends a text
            ids = generation.get("eos_token_id")
            eos = ids[0] if isinstance(ids, list) else ids
        self.eos_id: int | None = eos
        pad = self._special_id(config.get("pad_token"))
        # which id pads is of no consequence: padding is masked by length, never by id
        self.pad_id: int = pad if pad is not None else (eos if eos is not None else 0)
        self.vocab_size = self.tokenizer.get_vocab_size()
        self.special_tokens = {
            token.content: number
            for number, token in self.tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        template_file = folder / "chat_template.jinja"
        self.chat_template: str | None = (
            template_file.read_text()
            if template_file.is_file()
            else _default_template(config.get("chat_template"))
        )
        self._template_names = {
            name: self._token_text(config.get(name))
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Text -> token ids; bos only if the folder names one."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if add_bos and self.bos_id is not None:
            ids = [self.bos_id, *ids]
        if add_eos and self.eos_id is not None:
            ids = [*ids, self.eos_id]
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Token ids -> text."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def tokenize_messages(
        self, messages: Sequence[Message], add_eos: bool = True
    ) -> tuple[list[int], list[bool]]:
        """A conversation -> (tokens [n], mask [n]), mask True where a token is not trained on.

        The folder's chat template renders the whole conversation once. Trained on are the
        contents of messages that are not ``masked``, and the special token that ends each.

        Args:
            messages: torchtune messages; text only.
            add_eos: part of torchtune's interface; the template decides what ends a turn.

        Raises:
            InputError: no chat template, or one that rewrites contents, so that it cannot be told
                which of its text is the assistant's.
        """
        contents = [message.text_content for message in messages]
        roles = [message.role for message in messages]
        text, spans = self._render_with_spans(roles, contents)
        trained = [
            self._with_end_token(text, span)
            for span, message in zip(spans, messages, strict=True)
            if not message.masked
        ]
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        mask = [
            not any(start < last and end > first for first, last in trained)
            for start, end in encoded.offsets
        ]
        return encoded.ids[: self.max_seq_len], mask[: self.max_seq_len]

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> dict[str, Any]:
        """torchtune's transform: "messages" out, "tokens" and "mask" in."""
        sample = dict(sample)
        tokens, mask = self.tokenize_messages(sample.pop("messages"))
        return sample | {"tokens": tokens, "mask": mask}

    def render(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
    ) -> str:
        """Apply the chat template to {"role", "content"} messages.

        Raises:
            InputError: there is no template, or it refuses these messages.
        """
        if self.chat_template is None:
            raise InputError(
                "the tokenizer's folder has no chat template (chat_template in "
                "tokenizer_config.json, or chat_template.jinja), which chat data needs"
            )
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise_template_error
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        environment.filters["tojson"] = lambda value, **kwargs: json.dumps(
            value, ensure_ascii=False, **kwargs
        )
        try:
            return environment.from_string(self.chat_template).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                **self._template_names,
            )
        except TemplateError as error:
            raise InputError(f"the chat template refuses this conversation: {error}") from error

    def _render_with_spans(
        self, roles: Sequence[str], contents: Sequence[str]
    ) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text and where in it each message's content stands.

        Rendered a second time with a mark in place of each content, which shows the template's
        own text around them; the two must agree.
        """
        marks = [f"\ue000{number}\ue001" for number in range(len(roles))]
        text = self.render(_as_dicts(roles, contents))
        skeleton = self.render(_as_dicts(roles, marks))
        for inserted in (contents, [content.strip() for content in contents]):
            rebuilt, spans = "", []
            rest = skeleton
            for mark, content in zip(marks, inserted, strict=True):
                before, _, rest = rest.partition(mark)
                spans.append((len(rebuilt) + len(before), len(rebuilt + before + content)))
                rebuilt += before + content
            if rebuilt + rest == text:
                return text, spans
        raise InputError(
            "the chat template changes the contents of messages, so the assistant's part cannot "
            "be told from the rest: use a template that inserts contents as they are"
        )

    def _with_end_token(self, text: str, span: tuple[int, int]) -> tuple[int, int]:
        start, end = span
        for token in self.special_tokens:
            if text.startswith(token, end):
                return start, end + len(token)
        return span

    def _special_id(self, token: str | Mapping[str, Any] | None) -> int | None:
        text = self._token_text(token)
        if text is None:
            return None
        number = self.tokenizer.token_to_id(text)
        if number is None:
            raise InputError(f"tokenizer_config.json names {text!r}, which tokenizer.json lacks")
        return number

    @staticmethod
    def _token_text(token: str | Mapping[str, Any] | None) -> str | None:
        """A special token is a string, or an object with its text under "content"."""
        return token["content"] if isinstance(token, Mapping) else token


def load_tokenizer(node: Mapping[str, Any] | None, base_model: str | None) -> HFTokenizer:
    """A config's tokenizer component, or the tokenizer in the base model's folder.

    Raises:
        InputError: neither is there.
    """
    if node is not None:
        return instantiate(node, path="tokenizer")
    if base_model is None:
        raise InputError(
            "there is no tokenizer: set tokenizer to a component, for instance "
            "{_component_: moe_builders.data.tokenizer.HFTokenizer, path: FOLDER}"
        )
    return HFTokenizer(base_model)


def _default_template(template: str | list[dict[str, str]] | None) -> str | None:
    """A config holds one template, or a list of named ones."""
    if isinstance(template, list):
        return next((t["template"] for t in template if t["name"] == "default"), None)
    return template


def _as_dicts(roles: Sequence[str], contents: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
