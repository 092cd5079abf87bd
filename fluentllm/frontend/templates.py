"""Chat messages to prompt text, by the checkpoint's own Jinja template in a sandbox.

A template comes with a checkpoint, messages from anybody; so a template can read no Python internals and change none of
its arguments, and its output, its loops and its time are bounded. What a template offers to call is what Transformers offers.
"""

from __future__ import annotations

import json
import re
import time
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..core.errors import CheckpointError, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from jinja2.parser import Parser
    from jinja2.runtime import Context

MAX_CHARACTERS = 64 * 1024 * 1024
MAX_SECONDS = 20.0
MAX_REPEAT = 1_000_000
"""Longest result of `"x" * n` in a template."""

_MESSAGE_NAME = re.compile(r"\b(?:message|msg|m|loop_message)(?:\.name\b|\[\s*['\"]name['\"]\s*\]|\.get\(\s*['\"]name['\"])")

_GIVEN = {"messages", "add_generation_prompt", "tools", "documents"}
"""Variables that every template is rendered with. Like the special tokens, they are not for a request to choose."""


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}` marks answers for training; here only its content matters."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads it from the class

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Products of strings, lists and powers grow without bound; numbers may multiply."""
        for repeated, times in ((left, right), (right, left)):
            if (
                isinstance(repeated, (str, bytes, list, tuple))
                and isinstance(times, int)
                and len(repeated) * times > MAX_REPEAT
            ):
                raise SecurityError(f"repeats {len(repeated)} items {times} times; at most {MAX_REPEAT} result")
        if operator == "**" and not (abs(left) <= 1e6 and abs(right) <= 64):
            raise SecurityError(f"computes {left} ** {right}")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """One compiled template. Raises `CheckpointError` if it is not Jinja."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            read = meta.find_undeclared_variables(environment.parse(source))
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"The chat template is not valid Jinja: line {error.lineno}: {error.message}.",
                fix="Name another with model.chat_template.",
            ) from error
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        self.variables = frozenset(read - set(environment.globals) - set(self._special_tokens) - _GIVEN)
        """What it reads that a request may give, such as `enable_thinking`."""
        self.knows_developer = "developer" in source
        self.knows_tools = "tools" in read
        self.knows_tool_calls = "tool_calls" in source
        self.knows_names = _MESSAGE_NAME.search(source) is not None

    def check_tools(self) -> None:
        """Raises `InvalidRequest` if tools would be dropped without a word."""
        if not self.knows_tools:
            raise InvalidRequest(
                "tools are given, but this model's chat template has no place for them.",
                fix="Leave them out, or start with another template (model.chat_template).",
                param="tools",
            )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt. `variables`: some of `self.variables`. `tools`: in OpenAI's form. Raises `InvalidRequest`, with the
        template's own words where it refuses these messages."""
        for name in variables or ():
            if name not in self.variables:
                known = ", ".join(sorted(self.variables)) or "none"
                raise InvalidRequest(
                    f"The model's chat template has no variable {name!r} to set.",
                    fix=f"It has: {known}.",
                    param=f"chat_template_kwargs.{name}",
                )
        if tools:
            self.check_tools()
        try:
            return "".join(self._bounded(messages, add_generation_prompt, variables or {}, tools or None))
        except RecursionError:
            raise InvalidRequest("The chat template recurses without end on these messages.", param="messages") from None
        except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError) as error:
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {error}",
                fix="Change their roles, order or contents to what the model was trained on.",
                param="messages",
            ) from error

    def _bounded(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> Iterator[str]:
        deadline = time.monotonic() + MAX_SECONDS
        characters = 0
        pieces = self._template.generate(
            **variables,
            **self._special_tokens,
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            documents=None,
        )
        for piece in pieces:
            characters += len(piece)
            if characters > MAX_CHARACTERS:
                raise TemplateError(f"it writes more than {MAX_CHARACTERS} characters")
            if time.monotonic() > deadline:
                raise TemplateError(f"it takes longer than {MAX_SECONDS:.0f} seconds")
            yield piece
