"""Formats of answers: how Hermes and Qwen, LongCat, Llama 3, Mistral and DeepSeek models write tool calls and reasoning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluentllm.core.hookspecs import hookimpl

if TYPE_CHECKING:
    from fluentllm.core.protocols import AnswerFormat, Register


class AnswerFormats:
    """Registers them; a format's code is imported when a model's answers are written in it."""

    @hookimpl
    def fluent_answer_formats(self, register: Register) -> None:
        register("hermes", _hermes, supports=_supports_hermes)
        register("longcat", _longcat, supports=_needs("<longcat_tool_call>"))
        register("llama3_json", _llama, supports=_needs("<|start_header_id|>", '"parameters"'))
        register("mistral", _mistral, supports=_needs("[TOOL_CALLS]"))
        register("deepseek_v3", _deepseek, supports=_needs("<｜tool▁calls▁begin｜>"))


class _needs:  # noqa: N801 - a function with a memory
    """`supports` of a format whose templates hold all of these."""

    def __init__(self, *texts: str) -> None:
        self._texts = texts

    def __call__(self, template: str) -> str | None:
        missing = [text for text in self._texts if text not in template]
        return f"the chat template does not hold {missing[0]}" if missing else None


def _supports_hermes(template: str) -> str | None:
    for other in ("<arg_key>", "<function="):  # others' spellings between the same markers
        if other in template:
            return f"the chat template holds {other}"
    return _needs("<tool_call>")(template)


def _hermes(template: str) -> AnswerFormat:
    from .tagged import Hermes

    return Hermes(template)


def _longcat(template: str) -> AnswerFormat:
    from .longcat import LongCat

    return LongCat(template)


def _llama(template: str) -> AnswerFormat:
    from .llama import Llama3Json

    return Llama3Json(template)


def _mistral(template: str) -> AnswerFormat:
    from .mistral import Mistral

    return Mistral(template)


def _deepseek(template: str) -> AnswerFormat:
    from .deepseek import DeepSeekV3

    return DeepSeekV3(template)


plugin = AnswerFormats()
