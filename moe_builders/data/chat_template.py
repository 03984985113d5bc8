"""A Hugging Face chat template, rendered as transformers renders it, and where contents stand."""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moe_builders.errors import InputError
from moe_builders.instantiate import first_line

Span = tuple[int, int]
# private-use characters, which no template looks at and no text of the world contains
_MARK = re.compile("\ue000(\\d+)\ue001")


class _GenerationTag(Extension):
    """{% generation %} … {% endgeneration %}, put around answers by some templates: no effect."""

    tags = {"generation"}  # noqa: RUF012 jinja's own interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Keep what stands inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    names: Mapping[str, str],
    add_generation_prompt: bool = False,
) -> str:
    """The conversation as the template writes it.

    Args:
        template: jinja source.
        messages: {"role", "content"} each.
        names: special tokens that the template may use, by name ("bos_token").
        add_generation_prompt: end with what asks for an answer.

    Raises:
        InputError: the template is broken or refuses these messages.
    """
    try:
        compiled = _compiled(template)
    except TemplateSyntaxError as error:
        raise InputError(
            f"the chat template is broken at its line {error.lineno}: {first_line(error.message)}"
        ) from error
    try:
        return compiled.render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **names,
        )
    except Exception as error:  # a template is a program: it may raise anything
        raise InputError(
            f"the chat template refuses this conversation: {first_line(error)}"
        ) from error


def render_with_spans(
    template: str, roles: Sequence[str], contents: Sequence[str], *, names: Mapping[str, str]
) -> tuple[str, list[list[Span]]]:
    """The rendered text, and for each message where in it its content stands.

    Rendered a second time with a mark in place of each content, which shows the template's own
    text around them; the two must agree, but for white space around contents that the template
    strips. A message that the template leaves out stands nowhere.

    Raises:
        InputError: as ``render``, or the template rewrites contents.
    """
    marks = [f"\ue000{number}\ue001" for number in range(len(roles))]
    text = render(template, _as_dicts(roles, contents), names=names)
    skeleton = render(template, _as_dicts(roles, marks), names=names)
    spans = _find_contents(text, skeleton, contents)
    if spans is None:
        raise InputError(
            "the chat template changes the contents of messages, so the assistant's part cannot "
            "be told from the rest: use a template that inserts contents as they are"
        )
    return text, spans


def _find_contents(text: str, skeleton: str, contents: Sequence[str]) -> list[list[Span]] | None:
    first, *rest = _MARK.split(skeleton)  # text, number, text, number, …, text
    spans: list[list[Span]] = [[] for _ in contents]
    if not text.startswith(first):
        return None
    at = len(first)
    for number, after in zip(rest[::2], rest[1::2], strict=True):
        stripped = _stripped(contents[int(number)])
        inserted = next((s for s in stripped if text.startswith(s + after, at)), None)
        if inserted is None:
            return None
        spans[int(number)].append((at, at + len(inserted)))
        at += len(inserted + after)
    return spans if at == len(text) else None


def _stripped(content: str) -> list[str]:
    """The content as it is, and as templates strip it: all white space or line ends, any side."""
    left = (content, content.lstrip("\n"), content.lstrip())
    return [s for part in left for s in (part, part.rstrip("\n"), part.rstrip())]


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    """As transformers compiles it: what templates of the hub are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_template_error
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = _to_json
    return environment.from_string(template)


def _to_json(value: Any, ensure_ascii: bool = False, **kwargs: Any) -> str:
    """jinja's own would escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **kwargs)


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)


def _as_dicts(roles: Sequence[str], contents: Sequence[str]) -> list[dict[str, str]]:
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
