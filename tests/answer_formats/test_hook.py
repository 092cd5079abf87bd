"""The hook, as somebody else's plugin uses it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fluentllm.core import config
from fluentllm.core.hookspecs import hookimpl
from fluentllm.core.plugins import PluginManager
from fluentllm.core.protocols import AnswerParser, CallRules, Piece, Tool, Where
from fluentllm.core.types import GrammarSpec
from fluentllm.frontend.services import load_answer_format
from fluentllm.frontend.templates import ChatTemplate


class Shouting:
    """Implements `AnswerFormat` and `AnswerParser`: whatever is in capitals is reasoning."""

    markers = frozenset({"<loud>"})
    plain = False

    def __init__(self, template: str) -> None:
        self.template = template

    def where(self, prompt_end: str) -> Where:
        return "before"

    def parser(self, tools: Sequence[Tool], *, where: Where, separate_reasoning: bool) -> AnswerParser:
        return self

    def grammar(self, tools: Sequence[Tool], rules: CallRules) -> GrammarSpec:
        return GrammarSpec(kind="regex", source="[A-Z]+")

    def feed(self, text: str) -> list[Piece]:
        return [Piece("reasoning" if text.isupper() else "content", text)]

    def flush(self) -> list[Piece]:
        return []


class Plugin:
    @hookimpl
    def fluent_answer_formats(self, register: Any) -> None:
        register("shouting", Shouting, supports=lambda template: None if "LOUD" in template else "it is quiet")


def test_a_plugin_may_offer_one() -> None:
    formats = PluginManager.load({"frontend"}, allow=[], objects={"acme": Plugin()}).registry("answer_formats")
    settings = config.load(None, {}, {}).settings
    found = load_answer_format(settings, ChatTemplate("LOUD"), formats)
    assert isinstance(found, Shouting)
    assert found.template == "LOUD"
    assert load_answer_format(settings, ChatTemplate("quiet"), formats) is None
    assert formats.why_not("quiet")["shouting"] == "it is quiet"
    elsewhere = PluginManager.load({"engine"}, allow=[], objects={"acme": Plugin()})
    assert not elsewhere.registry("answer_formats").names()
