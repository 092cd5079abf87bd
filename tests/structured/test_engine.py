"""Structured outputs of a small real model: whole, valid, and the same tokens however they were come by."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from fluentllm import LLM, SamplingOptions, structured
from fluentllm.core.errors import InvalidRequest

from .conftest import needs_xgrammar

if TYPE_CHECKING:
    from fluentllm.frontend.generation import Completion

SETTINGS: dict[str, Any] = {
    "engine.device": "cpu",
    "engine.threads": 1,
    "model.dtype": "float32",  # in which rounding changes no token here
    "kv.memory": "64MiB",
    "plugins.grammar_xgrammar.max_whitespace": 1,
}
PROMPT = """x = {"name": "self", "age": 85, "tags": ["self", "name"], "at": null}  # self.names
y = {"name": "name", "age": 85, "tags": ["self", "name"], "at": null}  # self.names
z = """
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["self", "name"]}, "minItems": 2, "maxItems": 3},
        "at": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/at"}]},
    },
    "required": ["name", "age", "tags", "at"],
    "$defs": {"at": {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]}},
}
MAIL, RULES, WORDS = (
    r"[a-z]{3,8}@[a-z]{2,6}\.(com|org)",
    'root ::= "(" root ")" | [0-9] [0-9]',
    ["self.name", "self.names", "None"],
)


def asked() -> list[SamplingOptions]:
    """Greedy and drawn, of every kind, and one without a grammar."""
    chosen = [
        (structured.json_schema(PERSON), 0.0),
        (structured.json_schema(PERSON), 0.8),
        (structured.json_object(), 0.8),
        (structured.regex(MAIL), 0.8),
        (structured.choice(WORDS), 0.0),
        (structured.grammar(RULES), 0.8),
        (None, 0.0),
    ]
    return [
        SamplingOptions(max_tokens=60 if grammar else 20, temperature=temperature, seed=seed, grammar=grammar)
        for seed, (grammar, temperature) in enumerate(chosen)
    ]


def check(answers: list[Completion]) -> None:
    first, second, some, mail, word, nested, _ = (answer.text for answer in answers)
    for text in (first, second):
        jsonschema.validate(json.loads(text), PERSON)
    assert isinstance(json.loads(some), dict)
    assert re.fullmatch(MAIL, mail)
    assert word in WORDS
    assert re.fullmatch(r"\(*\d\d\)*", nested)
    assert nested.count("(") == nested.count(")")
    assert all(answer.finish_reason == "stop" for answer in answers[:6])


def answers(**settings: Any) -> list[Completion]:
    with LLM("longcat-nano", settings={**SETTINGS, **settings}) as llm:
        generation = llm._local.generation
        prompt = generation.tokenizer.encode(PROMPT)

        async def all_at_once() -> list[list[Completion]]:
            return await asyncio.gather(*(generation.complete(generation.job([prompt], options)) for options in asked()))

        return [answer for [answer] in llm._local.call(all_at_once())]


@pytest.fixture(scope="module")
def expected() -> list[Completion]:
    """One at a time, nothing drafted, nothing launched ahead."""
    with LLM("longcat-nano", settings={**SETTINGS, "engine.overlap_depth": 0}) as llm:
        return [llm.generate(PROMPT, options)[0] for options in asked()]


@needs_xgrammar
@pytest.mark.parametrize(
    ("method", "depth"), [("none", 1), ("none", 2), ("pld", 0), ("pld", 1), ("pld", 2), ("mtp", 0), ("mtp", 1), ("mtp", 2)]
)
def test_answers_are_whole_and_the_same(expected: list[Completion], method: str, depth: int) -> None:
    check(expected)
    settings = {"speculative.k": 3, "speculative.max_k": 3, "speculative.min_acceptance": 0.0} if method != "none" else {}
    found = answers(**{"speculative.method": method, "engine.overlap_depth": depth, **settings})
    assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]
    accepted = sum(answer.accepted for answer in found[:6])
    assert accepted == 0 if method == "none" else accepted > 5


@needs_xgrammar
def test_a_text_that_ignores_ends_goes_on_with_them() -> None:
    with LLM("longcat-nano", settings=SETTINGS) as llm:
        options = SamplingOptions(max_tokens=8, temperature=0, ignore_eos=True, grammar=structured.choice(["x"]))
        [answer] = llm.generate(PROMPT, options)
        assert (answer.text, answer.finish_reason) == ("x", "length")
        assert answer.tokens[1:] == [0] * 7
        with pytest.raises(InvalidRequest, match="Leave min_tokens out"):
            llm.generate(PROMPT, SamplingOptions(max_tokens=8, min_tokens=2, grammar=structured.choice(["x"])))


@needs_xgrammar
def test_what_was_compiled_is_kept_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    from fluentllm.core import grammars
    from fluentllm.plugins.grammar_xgrammar.compiler import Compiler

    compiled: list[str] = []
    own = Compiler.compile
    monkeypatch.setattr(Compiler, "compile", lambda self, source: (compiled.append(source), own(self, source))[1])
    monkeypatch.setattr(grammars, "HOST_GRAMMARS", 2)
    with LLM("longcat-nano", settings=SETTINGS) as llm:
        for pattern in ("a", "b", "a", "a", "c", "a", "b"):  # the longest unused goes
            [answer] = llm.generate(PROMPT, SamplingOptions(max_tokens=4, grammar=structured.regex(pattern)))
            assert answer.text == pattern
    assert compiled == ["a", "b", "c", "b"]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, r"xgrammar is not installed \(pip install 'fluentllm\[grammar\]'\)"),
        ("0.1.33", "xgrammar 0.1.33 reads schemas too"),
    ],
)
def test_without_the_library_everything_else_works(monkeypatch: pytest.MonkeyPatch, found: str | None, said: str) -> None:
    """As where the extra is not installed: who asks is told what to type."""
    monkeypatch.setattr("fluentllm.plugins.grammar_xgrammar._version", lambda: found)
    with LLM("longcat-nano", settings=SETTINGS) as llm:
        [plain] = llm.generate(PROMPT, SamplingOptions(max_tokens=4, temperature=0))
        assert len(plain.tokens) == 4
        with pytest.raises(InvalidRequest, match=f"kind 'json_object' are not available on this server: {said}") as refused:
            llm.generate(PROMPT, SamplingOptions(max_tokens=4, grammar=structured.json_object()))
        assert refused.value.status == 400


def test_nothing_is_imported_before_a_request_has_a_grammar() -> None:
    code = f"""
import sys
from fluentllm import LLM, SamplingOptions
with LLM("longcat-nano", settings={SETTINGS!r}) as llm:
    llm.generate("x", SamplingOptions(max_tokens=2))
    print(*{{"xgrammar", "tvm_ffi", "transformers"}} & set(sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
