"""The tokenizer and chat template of a Hugging Face folder, with torchtune's tokenizer methods.

Letters: n tokens of a sample.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torchtune.data import Message

from moe_builders.data.chat_template import Span, render, render_with_spans
from moe_builders.errors import InputError, lfs_pointer
from moe_builders.instantiate import first_line, instantiate

_REPAIR = "mend the row, or leave it out"


class HFTokenizer:
    """``tokenizer.json`` behind the interface that torchtune's datasets expect.

    Args:
        path: folder with tokenizer.json, and tokenizer_config.json for special tokens and the
            chat template (or chat_template.jinja).
        max_seq_len: samples are cut there; None: never.
        chat_template: a file with a template, or its text; None: the folder's.

    Raises:
        InputError: no tokenizer.json in the folder, a special token that is not in it, or no such
            template file.
    """

    def __init__(
        self,
        path: str | Path,
        max_seq_len: int | None = None,
        *,
        chat_template: str | Path | None = None,
    ) -> None:
        folder = Path(path)
        self.tokenizer = _read_tokenizer(folder)
        config = _read_json(folder / "tokenizer_config.json")
        generation = _read_json(folder / "generation_config.json")
        self.max_seq_len = max_seq_len
        self.bos_id = self._special_id(config.get("bos_token"))
        # some folders name a bos that their own tokenizer does not write
        self.adds_bos = self.bos_id is not None and config.get("add_bos_token") is not False
        eos = self._special_id(config.get("eos_token"))
        if eos is None:  # some folders name it only here; a list means any of them ends a text
            eos = _default_eos(generation.get("eos_token_id"))
        self.eos_id: int | None = eos
        pad = self._special_id(config.get("pad_token"))
        # which id pads is of no consequence: padding is masked by length, never by id
        self.pad_id: int = pad if pad is not None else (eos if eos is not None else 0)
        self.vocab_size = 1 + max(self.tokenizer.get_vocab().values(), default=-1)
        self.special_tokens = {
            token.content: number
            for number, token in self.tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        ends = {*self.special_tokens, self.tokenizer.id_to_token(eos) if eos is not None else None}
        words = "|".join(re.escape(end) for end in sorted(ends - {None}, key=len, reverse=True))
        self._end_token = re.compile(rf"\s*(?:{words})") if words else None
        self.chat_template: str | None = (
            _folder_template(folder, config)
            if chat_template is None
            else _given_template(str(chat_template))
        )
        named = {
            name: self._token_text(config.get(name))
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        # one that is null must be undefined to a template: None would be written as "None"
        self._template_names = {name: text for name, text in named.items() if text is not None}

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Text -> token ids; bos only if the folder names one and does not switch it off.

        Raises:
            InputError: not a text.
        """
        if not isinstance(text, str):
            raise InputError(f"its text is {shown(text)}, but must be a text: {_REPAIR}")
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if add_bos and self.adds_bos:
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
                which of its text is the assistant's; or messages that are more than text.
        """
        if any(message.contains_media for message in messages):
            raise InputError("a message holds an image, but only text can be trained on")
        for message in messages:
            for part in message.content:
                if not isinstance(part["content"], str):
                    raise InputError(
                        f"what {message.role!r} says is {shown(part['content'])}, but must be a "
                        f"text: {_REPAIR}"
                    )
        contents = [message.text_content for message in messages]
        roles = [message.role for message in messages]
        text, spans = render_with_spans(
            self._template(), roles, contents, names=self._template_names
        )
        trained = []
        for message, places in zip(messages, spans, strict=True):
            if not message.masked and not places:
                raise InputError(f"the chat template leaves a message of {message.role!r} out")
            trained += [] if message.masked else [self._with_end_token(text, s) for s in places]
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
        return render(
            self._template(),
            messages,
            names=self._template_names,
            add_generation_prompt=add_generation_prompt,
        )

    def _template(self) -> str:
        if self.chat_template is None:
            raise InputError(
                "the tokenizer's folder has no chat template (chat_template in "
                "tokenizer_config.json, or chat_template.jinja), which chat data needs: add "
                "one, or set the tokenizer's chat_template to a file"
            )
        return self.chat_template

    def _with_end_token(self, text: str, span: Span) -> Span:
        """The span with the special token behind it; some templates put a space in between."""
        start, end = span
        token = self._end_token.match(text, end) if self._end_token is not None else None
        return (start, end) if token is None else (start, token.end())

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
        text = token.get("content", token) if isinstance(token, Mapping) else token
        if text is not None and not isinstance(text, str):
            raise InputError(
                f"tokenizer_config.json names {text!r} as a special token, but it must be a text, "
                'or {"content": text}'
            )
        return text


def load_tokenizer(node: Mapping[str, Any] | None, base_model: str | None) -> HFTokenizer:
    """A config's tokenizer component, or the tokenizer in the base model's folder.

    Raises:
        InputError: neither is there, or it cannot be built.
    """
    if node is not None:
        try:
            return instantiate(node, path="tokenizer")
        except (OSError, RuntimeError, TypeError) as error:  # sentencepiece's, of a missing file
            raise InputError(
                f"tokenizer {node['_component_']} cannot be built: {first_line(error)}"
            ) from error
    if base_model is None:
        raise InputError(
            "there is no tokenizer: set tokenizer to a component, for instance "
            "{_component_: moe_builders.data.tokenizer.HFTokenizer, path: FOLDER}"
        )
    return HFTokenizer(base_model)


def _folder_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    return _default_template(config.get("chat_template"))


def _given_template(template: str) -> str:
    """A template's text has a jinja tag in it, a file's name has not."""
    if "{{" in template or "{%" in template:
        return template
    if not Path(template).is_file():
        raise InputError(
            f"chat_template is {template!r}, which is neither a file nor a jinja template"
        )
    return Path(template).read_text(encoding="utf-8")


def _default_template(template: str | list[dict[str, str]] | None) -> str | None:
    """A config holds one template, or a list of named ones."""
    if isinstance(template, list):
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    if template is not None and not isinstance(template, str):
        raise InputError(
            f"chat_template in tokenizer_config.json is {template!r}, but must be a text"
        )
    return template


def _default_eos(ids: Any) -> int | None:
    """The first of generation_config.json's."""
    first = next(iter(ids), None) if isinstance(ids, list) else ids
    if first is not None and not (isinstance(first, int) and first >= 0):
        raise InputError(
            f"eos_token_id in generation_config.json is {first!r}, but must be a token's number"
        )
    return first


def shown(value: Any) -> str:
    """A value for a message: as YAML and JSON write it, and not too long."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _read_tokenizer(folder: Path) -> Tokenizer:
    if not (folder / "tokenizer.json").is_file():
        raise InputError(
            f"{folder} has no tokenizer.json: name a folder that has one in tokenizer.path "
            "(with tokenizer._component_: moe_builders.data.tokenizer.HFTokenizer)"
        )
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises nothing narrower
        raise InputError(
            lfs_pointer(folder / "tokenizer.json")
            or f"{folder / 'tokenizer.json'} cannot be read: {first_line(error)}"
        ) from error
    tokenizer.no_truncation()  # a folder may keep both from somebody's training run
    tokenizer.no_padding()
    return tokenizer


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} is not a JSON object, but a {type(values).__name__}")
    return values
