"""One sample of a torchtune data set as (tokens, labels), and what is wrong with one in a sentence.

torchtune drops some things without a word (a message without content becomes the one before it);
here they are errors.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import ConcatDataset
from torchtune.data import OpenAIToMessages, ShareGPTToMessages

from moe_builders.data.tokenizer import shown
from moe_builders.errors import InputError
from moe_builders.instantiate import first_line

_SPEAKERS = ("system", "human", "gpt")  # of ShareGPT, as torchtune reads it
_ROLES = {"system", "user", "assistant"}  # of OpenAI's
_UNREADABLE = (
    ValueError, TypeError, LookupError, AttributeError, AssertionError, NameError, OSError,
)  # fmt: skip


def read_sample(dataset: Any, index: int, path: str) -> tuple[list[int], list[int]]:
    """(tokens, labels) of one sample, as torchtune leaves them: a label is the token itself.

    Args:
        dataset: torchtune samples; any map-style dataset with "tokens" and "labels".
        index: which.
        path: where in the config the data set stands, for messages.

    Raises:
        InputError: a row that the data set's own transforms cannot read, or not such a sample.
    """
    if isinstance(dataset, ConcatDataset):  # a mistake is named by its own set and number
        number = bisect_right(dataset.cumulative_sizes, index)
        before = dataset.cumulative_sizes[number - 1] if number else 0
        return read_sample(dataset.datasets[number], index - before, f"{path}[{number}]")
    where = f"{path}: sample {index}"
    if not is_torchtune(dataset):
        return _checked(lambda: dataset[index], dataset, where)
    return read_document(dataset, lambda: dataset._data[index], where)


def read_document(
    dataset: Any, row: Callable[[], Mapping[str, Any]], where: str
) -> tuple[list[int], list[int]]:
    """(tokens, labels) of one of a torchtune data set's rows, sized or streamed.

    Args:
        dataset: its ``_prepare_sample`` makes tokens and labels of a row.
        row: gives the row.
        where: its name in messages.

    Raises:
        InputError: see ``read_sample``.
    """

    def prepare() -> Any:
        columns = row()
        _refuse_what_is_dropped(dataset, columns, where)
        try:
            return dataset._prepare_sample(columns)
        except ValueError as error:
            strange = sorted(roles_of(dataset, columns) - _ROLES)
            if not strange or isinstance(error, InputError):
                raise
            raise InputError(
                f"{where} has messages from {', '.join(strange)}, but those of a chat are from "
                f"system, user and assistant in turn ({first_line(error)}): rename the roles, or "
                "write what a tool says into the user's message"
            ) from error

    return _checked(prepare, dataset, where)


def is_torchtune(dataset: Any) -> bool:
    """Whether it is one of torchtune's classes, which keep rows and what is done to them apart."""
    return hasattr(dataset, "_data") and callable(getattr(dataset, "_prepare_sample", None))


def roles_of(dataset: Any, row: Mapping[str, Any]) -> set[str]:
    """Who speaks in a row of an OpenAI-style data set; empty for others."""
    transform = getattr(dataset, "_message_transform", None)
    if not isinstance(transform, OpenAIToMessages):
        return set()
    return {str(message["role"]) for message in row[transform._column_map["messages"]]}


def _checked(prepare: Callable[[], Any], dataset: Any, where: str) -> tuple[list[int], list[int]]:
    try:
        sample = prepare()
    except KeyError as error:
        raise InputError(f"{where} {_missing(error, dataset)}") from error
    except InputError as error:  # the tokenizer's and templates': they know no number
        raise InputError(error if str(error).startswith(where) else f"{where}: {error}") from error
    except _UNREADABLE as error:
        raise InputError(f"{where} cannot be used: {first_line(error)}") from error
    if not isinstance(sample, Mapping) or not {"tokens", "labels"} <= set(sample):
        found = sorted(sample) if isinstance(sample, Mapping) else type(sample).__name__
        raise InputError(f"{where} must hold 'tokens' and 'labels', but is {found}")
    tokens, labels = list(sample["tokens"]), list(sample["labels"])
    if len(tokens) != len(labels):
        raise InputError(f"{where} has {len(tokens)} tokens, but {len(labels)} labels")
    return tokens, labels


def _missing(error: KeyError, dataset: Any) -> str:
    key = error.args[0] if error.args else None
    if isinstance(getattr(dataset, "_message_transform", None), ShareGPTToMessages):
        if key in ("from", "value"):
            return (
                f"has a message without {key!r}: conversation_style sharegpt reads 'from' and "
                "'value', openai reads 'role' and 'content'"
            )
        if isinstance(key, str) and key in ("user", "assistant", "tool", "function", "bot"):
            return (
                f"has a message from {key!r}, but conversation_style sharegpt knows "
                f"{', '.join(_SPEAKERS)} only: rename it"
            )
    columns = getattr(getattr(dataset, "_data", None), "column_names", None)
    there = f"; its columns are {', '.join(columns)}" if columns else ""
    return f"has no {first_line(error)}{there}"


def _refuse_what_is_dropped(dataset: Any, row: Mapping[str, Any], where: str) -> None:
    """Messages that torchtune's OpenAI style would change silently."""
    transform = getattr(dataset, "_message_transform", None)
    if not isinstance(transform, OpenAIToMessages):
        return
    column = transform._column_map["messages"]
    messages = row[column]
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        raise InputError(
            f"{where} has {shown(messages)} for {column!r}, but must hold a list of messages, "
            '{"role": "user", "content": "..."} each'
        )
    for number, message in enumerate(messages):
        if message.get("role") is None:
            style = (
                "set conversation_style to sharegpt" if "from" in message
                else "rename them (sharegpt would read 'from' and 'value')"
            )  # fmt: skip
            raise InputError(
                f"{where}: message {number} holds {', '.join(message)}, but conversation_style "
                f"openai reads 'role' and 'content': {style}"
            )
        if message.get("tool_calls"):
            raise InputError(
                f"{where}: message {number} holds tool_calls, which no chat template gets to see "
                "here: write them into its content, or leave the sample out"
            )
        if "content" in message and not isinstance(message["content"], str | list):
            raise InputError(
                f"{where}: message {number} has {shown(message['content'])} for its content, but "
                "must hold a text"
            )
