"""Grammars of the kind `structural_tag`, and those that the answer formats write: what is a call, in every spelling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from answer_formats.reading import format_of
from frontend.checkpoints import byte_level, write_folder
from tokenizers import AddedToken

from fluentllm import structured
from fluentllm.core.errors import InvalidRequest
from fluentllm.core.protocols import CallRules, Tool
from fluentllm.core.types import GrammarSpec
from fluentllm.frontend.tokenizer import Tokenizer, load_tokenizer
from fluentllm.plugins.grammar_xgrammar.compiler import Compiler, Library
from fluentllm.plugins.grammar_xgrammar.matcher import CompiledGrammar

from .conftest import context, needs_xgrammar

pytestmark = needs_xgrammar
EOS = 2
WEATHER = Tool(
    name="get_weather",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "zip": {"enum": ["0<", "b"]}},
        "required": ["city"],
    },
    strict=True,
)
TIME = Tool(name="time", parameters={"type": "object", "properties": {}})


class Texts:
    """Says which texts a grammar takes as a whole."""

    def __init__(self, folder: Path, special: tuple[str, ...] = (), max_whitespace: int | None = 1) -> None:
        backend = byte_level()
        backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
        self.tokenizer: Tokenizer = load_tokenizer(write_folder(folder, backend, eos_token="<|im_end|>"))
        self.library = Library(context(folder, self.tokenizer.vocab_size, (EOS,)), max_whitespace)

    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        return Compiler(spec.kind, self.library).compile(spec.source)

    def takes(self, grammar: CompiledGrammar, text: str) -> bool:
        matcher = grammar.matcher()
        return all(matcher.accept(token) for token in [*self.tokenizer.encode(text), EOS])


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    return Texts(tmp_path_factory.mktemp("texts"))


CALL = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
H = f"<tool_call>\n{CALL}\n</tool_call>"
C = f"<longcat_tool_call>{CALL}</longcat_tool_call>"
L0 = "<longcat_tool_call>time\n</longcat_tool_call>"
L = (
    "<longcat_tool_call>get_weather\n<longcat_arg_key>city</longcat_arg_key>\n<longcat_arg_value>Pa<ris</longcat_arg_value>\n"
    "<longcat_arg_key>days</longcat_arg_key>\n<longcat_arg_value>3</longcat_arg_value>\n"
    "<longcat_arg_key>zip</longcat_arg_key>\n<longcat_arg_value>0<</longcat_arg_value>\n</longcat_tool_call>"
)
J = CALL.replace("arguments", "parameters")
M = f"[TOOL_CALLS][{CALL}]"
N = '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}'
D = (
    '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>'
    "<｜tool▁calls▁end｜>"
)
DD = D.replace("<｜tool▁calls▁end｜>", D.removeprefix("<｜tool▁calls▁begin｜>"))
D3 = D.replace("get_weather<｜tool▁sep｜>", "function<｜tool▁sep｜>get_weather\n```json\n").replace("}<", "}\n```<", 1)
ARGUMENTS = ("<longcat_arg_key>", "[ARGS]", "```json")


@pytest.mark.parametrize(
    ("name", "template", "one", "two", "broken"),
    [
        ("hermes", "", H, f"{H}\n{H}", H.replace('"Paris"', "3")),
        ("longcat", "", C, f"{C}\n{C}", C.replace('"Paris"', "3")),
        ("longcat", ARGUMENTS[0], L, f"{L0}\n{L}", L.replace(">3<", ">x<")),
        ("longcat", ARGUMENTS[0], L0, f"{L0}\n{L0}", L0.replace("time", "get_weather")),
        ("llama3_json", "", J, f"{J}; {J}", J.replace('"Paris"', "3")),
        ("mistral", "", M, f"[TOOL_CALLS][{CALL}, {CALL}]", M.replace('"Paris"', "3")),
        ("mistral", "[TOOL_CALLS] [", M.replace("][", "] ["), f"[TOOL_CALLS] [{CALL}, {CALL}]", M),
        ("mistral", ARGUMENTS[1], N, N + N, N.replace('"Paris"', "3")),
        (
            "deepseek_v3",
            "",
            D,
            D.replace("<｜tool▁calls▁end｜>", D.removeprefix("<｜tool▁calls▁begin｜>")),
            D.replace("city", "x"),
        ),
        ("deepseek_v3", ARGUMENTS[2], D3, D3.replace("<｜tool▁calls▁end｜>", D3.replace("<｜tool▁calls▁begin｜>", "\n")), D),
    ],
)
def test_every_format(texts: Texts, name: str, template: str, one: str, two: str, broken: str) -> None:
    made = format_of(name, template)

    def grammar(*, required: bool, parallel: bool) -> CompiledGrammar:
        return texts.compile(made.grammar([WEATHER, TIME], CallRules(required=required, parallel=parallel, where="before")))

    must, once = grammar(required=True, parallel=True), grammar(required=True, parallel=False)
    assert all(texts.takes(must, text) for text in (one, two))
    assert not any(texts.takes(must, text) for text in ("", "Hello", broken, f"Hello {one}", f"{one} Hello"))
    assert texts.takes(once, one)
    assert not texts.takes(once, two)
    may = grammar(required=False, parallel=True)
    assert all(texts.takes(may, text) for text in ("Hello", one, two))
    assert not texts.takes(may, broken)
    assert texts.takes(may, f"Hello {one}") or name == "llama3_json"
    parser = made.parser([WEATHER, TIME], where="before", separate_reasoning=True)
    kinds = [piece.kind for piece in parser.feed(two) + parser.flush()]
    assert kinds.count("end") == 2  # what the grammar writes the parser reads
    assert "content" not in kinds


def test_reasoning_may_come_first(texts: Texts) -> None:
    def grammar(template: str, where: Any) -> CompiledGrammar:
        return texts.compile(
            format_of("hermes", template).grammar([WEATHER], CallRules(required=True, parallel=True, where=where))
        )

    thought, inside = f"<think>a <b\n</think>\n\n{H}", f"a <b\n</think>\n\n{H}"
    before = grammar("</think>", "before")
    assert [texts.takes(before, text) for text in (H, thought, inside)] == [True, True, False]
    opened = grammar("</think>", "inside")
    assert [texts.takes(opened, text) for text in (H, thought, inside)] == [False, True, True]
    for never in (grammar("</think>", "behind"), grammar("", "before")):
        assert [texts.takes(never, text) for text in (H, thought, inside)] == [True, False, False]


OTHERWISE = [
    (structured.json_object(), '{"a": 1}', "[]"),
    (structured.json_schema({"type": "integer"}), "12", '"a"'),
    (structured.regex("[ab]{3}"), "aba", "ab"),
    (structured.choice(["yes", 'n"o']), 'n"o', "no"),
    (structured.grammar('root ::= "x" [0-9]'), "x1", "x"),
]


@pytest.mark.parametrize(("otherwise", "good", "bad"), OTHERWISE, ids=[grammar.kind for grammar, _, _ in OTHERWISE])
@pytest.mark.parametrize(("name", "one"), [("hermes", H), ("llama3_json", J), ("mistral", M)])
def test_an_answer_that_calls_nothing_may_have_a_grammar_too(
    texts: Texts, name: str, one: str, otherwise: GrammarSpec, good: str, bad: str
) -> None:
    rules = CallRules(required=False, parallel=True, where="before", otherwise=otherwise)
    grammar = texts.compile(format_of(name).grammar([WEATHER], rules))
    assert [texts.takes(grammar, text) for text in (one, good, bad, f"{one} {good}")] == [True, True, False, False]
    odd = CallRules(required=False, parallel=True, where="before", otherwise=GrammarSpec(kind="table", source=""))
    with pytest.raises(InvalidRequest, match="'table' leaves no room"):
        format_of(name).grammar([WEATHER], odd)


def test_special_tokens_that_are_named_stand_for_their_text(tmp_path: Path) -> None:
    texts = Texts(tmp_path, ("<tool_call>", "</tool_call>", "<other>"))
    spec = format_of("hermes").grammar([WEATHER], CallRules(required=True, parallel=True, where="behind"))
    grammar = texts.compile(spec)
    ids = texts.tokenizer.encode(H)
    assert ids[0] in texts.tokenizer.special_ids
    assert texts.takes(grammar, H)
    assert not texts.takes(grammar, H.replace("Paris", "<other>"))
    assert texts.library.spelling(["<tool_call>"]) is texts.library.spelling(["<tool_call>", "no token"])
    assert texts.library.spelling([]) is texts.library.compiler
    without = texts.compile(
        GrammarSpec(kind="structural_tag", source=json.dumps({**json.loads(spec.source), "special_tokens": []}))
    )
    assert not texts.takes(without, H)


LOOSE = {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 5}}, "required": ["a"]}


def test_what_need_not_be_strict_is_kept_to_as_far_as_can_be(texts: Texts) -> None:
    made = format_of("llama3_json")

    def grammar(parameters: dict[str, Any], *, strict: bool) -> CompiledGrammar:
        tool = Tool(name="f", parameters=parameters, strict=strict)
        return texts.compile(made.grammar([tool], CallRules(required=True, parallel=True, where="behind")))

    with pytest.raises(InvalidRequest, match="multipleOf"):
        grammar(LOOSE, strict=True)
    with pytest.raises(InvalidRequest, match="structural tag cannot be used"):
        grammar({"type": "object", "properties": {"a": {"type": "strin"}}}, strict=True)
    for parameters in (LOOSE, {"type": "object", "properties": {"a": {"type": "strin"}}}):
        loose = grammar(parameters, strict=False)
        assert texts.takes(loose, '{"name": "f", "parameters": {"b": [1]}}')
        assert not texts.takes(loose, '{"name": "f", "parameters": [1]}')
    kept = grammar(WEATHER.parameters, strict=False)
    assert not texts.takes(kept, '{"name": "f", "parameters": {"city": "Paris", "more": 1}}')
    assert not texts.takes(kept, J.replace("get_weather", "f").replace("city", "b"))


def test_strict_texts_that_the_spelling_cannot_keep_to(texts: Texts) -> None:
    made = format_of("longcat", ARGUMENTS[0])

    def written(*, strict: bool, **schema: Any) -> GrammarSpec:
        tool = Tool(name="f", parameters={"type": "object", "properties": {"a": schema}, "required": ["a"]}, strict=strict)
        return made.grammar([tool], CallRules(required=True, parallel=True, where="behind"))

    with pytest.raises(InvalidRequest, match=r"properties\.a\.pattern"):
        written(strict=True, type="string", pattern="x")
    value = "<longcat_tool_call>f\n<longcat_arg_key>a</longcat_arg_key>\n"
    value += "<longcat_arg_value>%s</longcat_arg_value>\n</longcat_tool_call>"
    assert texts.takes(texts.compile(written(strict=False, type="string", pattern="x")), value % "y")
    one = texts.compile(written(strict=True, type="string", enum=["x", "y"]))
    assert [texts.takes(one, value % text) for text in ("x", "y", "z", '"x"')] == [True, True, False, False]
    either = texts.compile(written(strict=True, type=["string", "null"]))
    assert [texts.takes(either, value % text) for text in ("null", '"x"', "x")] == [True, True, False]


BROKEN = [
    ("", "not valid JSON"),
    ("[]", "no JSON object"),
    ('{"type": "structural_tag"}', "structural tag cannot be used"),
    ('{"type": "structural_tag", "format": {"type": "x"}}', "structural tag cannot be used"),
    ('{"type": "structural_tag", "format": {"type": "any_text"}, "special_tokens": "x"}', "no list of texts"),
    ('{"type": "structural_tag", "format": ' + '{"type": "star", "content": ' * 40 + "0" + "}" * 41, "inside each other"),
    ('{"type": "structural_tag", "format": {"type": "json_schema", "json_schema": {"not": {}}}}', "not: it is not supported"),
]


@pytest.mark.parametrize(("source", "words"), BROKEN)
def test_what_is_wrong_is_told(texts: Texts, source: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        texts.compile(GrammarSpec(kind="structural_tag", source=source))


@pytest.mark.parametrize("most", [None, 0, 3])
def test_white_space_is_bounded(tmp_path: Path, most: int | None) -> None:
    texts = Texts(tmp_path, max_whitespace=most)
    grammar = texts.compile(
        format_of("llama3_json").grammar([WEATHER], CallRules(required=True, parallel=True, where="behind"))
    )
    assert texts.takes(grammar, J)
    spaces = {size: texts.takes(grammar, J.replace('"city": ', '"city":' + " " * size)) for size in (0, 1, 3, 9)}
    assert spaces == {size: size <= (99 if most is None else max(1, most)) for size in spaces}
