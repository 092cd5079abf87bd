"""The plugin `grammar_xgrammar` on the library itself: masks, vocabularies, ends, and what of JSON Schema is kept to."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
from frontend.checkpoints import byte_level, sentencepiece_like, write_folder
from frontend.test_gguf_tokenizer import write_gguf
from tokenizers import Tokenizer as Backend, models

from fluentllm import structured
from fluentllm.core.errors import InvalidRequest
from fluentllm.frontend.tokenizer import load_tokenizer
from fluentllm.hub import resolve

from .conftest import NANO, context, needs_xgrammar

if TYPE_CHECKING:
    from fluentllm.core.protocols import GrammarMatcher
    from fluentllm.core.types import GrammarSpec
    from fluentllm.plugins.grammar_xgrammar.compiler import Library

pytestmark = needs_xgrammar
EOS = 0


def matcher_of(library: Library, spec: GrammarSpec) -> GrammarMatcher:
    from fluentllm.plugins.grammar_xgrammar.compiler import Compiler

    return Compiler(spec.kind, library).compile(spec.source).matcher()


def allowed(matcher: GrammarMatcher, vocab_size: int = NANO) -> set[int]:
    words = -(-vocab_size // 32)
    mask = memoryview(bytearray(4 * words)).cast("i")
    matcher.fill(mask)
    return {token for token in range(vocab_size) if mask[token // 32] >> token % 32 & 1}


CHOICES = ['yes "x"', "yes", "nö\n", "nö\\", "😀", "a]b[c", ""]


def test_masks_are_what_may_follow(library: Library) -> None:
    """Against every token's bytes, tried one by one, on random walks with steps back."""
    tokenizer = load_tokenizer(resolve("longcat-nano").path)
    spelt = {token: tokenizer.token_bytes(token) for token in range(1, NANO) if token not in tokenizer.special_ids}
    wanted = [choice.encode() for choice in CHOICES]
    rng = random.Random(3)
    seen = set()
    for _ in range(12):
        matcher = matcher_of(library, structured.choice(CHOICES))
        tokens: list[int] = []
        while EOS not in tokens:
            text = b"".join(map(spelt.__getitem__, tokens))
            expected = {token for token, more in spelt.items() if any(each.startswith(text + more) for each in wanted)}
            expected |= {EOS} if text in wanted else set()
            assert allowed(matcher) == expected
            assert not matcher.accept(rng.choice([token for token in spelt if token not in expected]))
            ahead = [token for token in rng.sample(sorted(expected), min(2, len(expected))) if matcher.accept(token)]
            matcher.rollback(len(ahead))
            assert allowed(matcher) == expected
            tokens.append(rng.choice(sorted(expected)))
            assert matcher.accept(tokens[-1])
        seen.add(b"".join(map(spelt.__getitem__, tokens[:-1])))
    assert len(seen) > 3
    assert seen <= set(wanted)


def test_behind_the_end_there_are_only_ends(library: Library) -> None:
    matcher = matcher_of(library, structured.regex("[a-z]?"))
    a, b = (load_tokenizer(resolve("longcat-nano").path).encode(letter)[0] for letter in "ab")
    assert [matcher.accept(token) for token in (a, EOS, EOS, b, EOS)] == [True, True, True, False, True]
    assert allowed(matcher) == {EOS}
    matcher.rollback(2)
    assert allowed(matcher) == {EOS}
    matcher.rollback(1)  # the end itself
    assert allowed(matcher) == {EOS}
    assert not matcher.accept(b)
    matcher.rollback(1)
    assert {a, b, EOS} < allowed(matcher)


def test_several_ends_the_last_bit_of_a_word_and_a_padded_vocabulary(tmp_path: Path) -> None:
    from fluentllm.plugins.grammar_xgrammar.compiler import Library, vocabulary

    folder = write_folder(tmp_path, byte_level(), {"eos_token_id": [2, 31]}, eos_token="<|im_end|>")
    tokenizer = load_tokenizer(folder)
    padded = Library(context(folder, 450, (63,)), None)
    matcher = matcher_of(padded, structured.regex(r"(.|\n)*"))
    free = allowed(matcher, 450)
    assert max(free) < tokenizer.vocab_size == 400
    assert not free & {0, 1}  # special ones stand for no text
    assert {2} | {token for token in range(3, 400) if tokenizer.token_bytes(token).isascii()} <= free
    for end in (2, 31, 63):
        again = matcher_of(padded, structured.choice(["x"]))
        assert again.accept(tokenizer.encode("x")[0])
        assert allowed(again, 450) == {2, 31, 63}
        assert again.accept(end)
        assert allowed(again, 450) == {2, 31, 63}
    # An end that the tokenizer does not know, and a model whose vocabulary is smaller than its tokenizer's.
    beyond = matcher_of(Library(context(folder, 450, (449,)), None), structured.regex("x?"))
    assert allowed(beyond, 450) == {2, 31, 449, *tokenizer.encode("x")}
    assert len(vocabulary(tokenizer, 300)) == 300


@pytest.mark.parametrize("kind", ["folder", "gguf", "pieces", "gguf pieces"])
def test_every_tokenizer_spells_the_text_that_was_matched(tmp_path: Path, kind: str) -> None:
    from fluentllm.plugins.grammar_xgrammar.compiler import Library

    backend = sentencepiece_like() if "pieces" in kind else byte_level()
    end = 2
    if "gguf" in kind:
        layout = ("llama",) if "pieces" in kind else ("gpt2", "gpt-2")
        path = write_gguf(tmp_path / "model.gguf", backend, *layout, eos_token_id=end)
    else:
        path = write_folder(tmp_path, backend, eos_token="</s>" if "pieces" in kind else "<|im_end|>")
    tokenizer = load_tokenizer(path)
    wanted = 'Привет, "мир"! 你好 \\ 12'
    matcher = matcher_of(Library(context(path, tokenizer.vocab_size, (end,)), None), structured.choice([wanted]))
    rng, tokens = random.Random(1), [-1]
    while tokens[-1] != end:
        tokens.append(rng.choice(sorted(allowed(matcher, tokenizer.vocab_size))))
        assert matcher.accept(tokens[-1])
    assert b"".join(map(tokenizer.token_bytes, tokens[1:-1])).decode() == wanted


def test_models_that_cannot_have_grammars_are_told_why(tmp_path: Path) -> None:
    from fluentllm.plugins.grammar_xgrammar.compiler import Library

    words = write_folder(tmp_path / "words", Backend(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    with pytest.raises(InvalidRequest, match="does not tell the bytes of a token"):
        Library(context(words, 2, (1,)), None)
    endless = write_folder(tmp_path / "endless", byte_level())
    with pytest.raises(InvalidRequest, match="no end-of-sequence token"):
        Library(context(endless, 400, ()), None)


def test_dummy_weights_without_a_tokenizer_have_bytes(tmp_path: Path) -> None:
    from fluentllm.plugins.grammar_xgrammar.compiler import Library

    (tmp_path / "config.json").write_text("{}")
    library = Library(context(tmp_path, 300, (299,), **{"model.load_format": "dummy"}), None)
    assert allowed(matcher_of(library, structured.regex("[ab]")), 300) == {ord("a"), ord("b")}


INTEGER, STRING = {"type": "integer"}, {"type": "string"}
NODE = {
    "type": "object",
    "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
    "required": ["next"],
}
NAMED_LIKE_KEYWORDS = {"type": "object", "properties": {"not": {"type": "null"}, "if": INTEGER}, "required": ["if"]}
KEPT: list[tuple[dict[str, Any], list[Any]]] = [
    # schema, values of which some are valid and some are not
    ({"type": "integer", "minimum": 3, "maximum": 12}, [3, 12, 2, 13]),
    ({"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 6}, [4, 5, 3, 6]),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, [0.5, 1, 0, 1.5]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "a", "abcd"]),
    ({"type": "string", "pattern": "^(?:\\d{3}-)?[a-c]+$"}, ["123-abc", "c", "123", "d"]),
    ({"type": "string", "pattern": "^[$^|(]\\$\\^(?:a|b)$"}, ["|$^a", "($^b", "|$a"]),
    ({"type": "string", "format": "date"}, ["2024-01-31", "yesterday"]),
    ({"type": ["integer", "null"], "minimum": 3}, [3, None, 2, "3"]),
    ({"enum": [1, "x", None, [1]]}, [1, "x", None, [1], 2]),
    ({"type": "string", "const": 'a"b'}, ['a"b', "a"]),
    ({"type": "array", "items": INTEGER, "minItems": 1, "maxItems": 2}, [[1], [1, 1], [], [1, 2, 3]]),
    ({"type": "array", "items": INTEGER, "uniqueItems": False}, [[1, 1], ["a"]]),
    ({"type": "array", "prefixItems": [INTEGER, STRING], "items": False}, [[1, "a"], ["a", 1], [1, "a", 2]]),
    ({"properties": {"a": INTEGER, "b": {}}, "required": ["a"], "minLength": 3}, [{"a": 1}, {"a": 1, "b": []}, {"b": 1}, {}]),
    ({"type": "object", "additionalProperties": INTEGER, "minProperties": 1}, [{"a": 1}, {"a": 1, "b": 2}, {}, {"a": "x"}]),
    ({"properties": {"a": {}, "b": {}}, "minProperties": 2}, [{"a": 1, "b": 2}, {"a": 1}]),
    ({"type": "object", "additionalProperties": INTEGER, "maxProperties": 1}, [{"a": 1}, {}, {"a": 1, "b": 2}]),
    ({"type": "object", "patternProperties": {"^a+$": INTEGER}}, [{"aa": 1}, {"a": "x"}]),
    ({"type": "object", "propertyNames": {"pattern": "^a+$"}, "additionalProperties": True}, [{"aa": "x"}, {"b": 1}]),
    ({"anyOf": [INTEGER, STRING], "title": "Either"}, [1, "a", None]),
    ({"allOf": [{"type": "string", "minLength": 2}]}, ["ab", "a"]),
    ({"$ref": "#/$defs/node", "$defs": {"node": NODE}}, [{"next": {"next": None}}, {"next": None}, {"next": 1}, {}]),
    (NAMED_LIKE_KEYWORDS, [{"if": 1}, {"not": None}]),
]


@pytest.mark.parametrize(("schema", "values"), KEPT, ids=[str(sorted(schema)) for schema, _ in KEPT])
def test_schemas_are_kept_to(library: Library, schema: dict[str, Any], values: list[Any]) -> None:
    tokenizer = load_tokenizer(resolve("longcat-nano").path)
    checks = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    found = {}
    for value in values:
        matcher = matcher_of(library, structured.json_schema(schema))
        text = json.dumps(value)
        found[text] = all(map(matcher.accept, [*tokenizer.encode(text), EOS]))
    assert found == {json.dumps(value): checks.is_valid(value) for value in values}
    assert set(found.values()) == {True, False}


def nested(depth: int) -> dict[str, Any]:
    return {"type": "array", "items": nested(depth - 1)} if depth else {}


REFUSED: list[tuple[Any, str]] = [
    ({"type": "strin"}, 'Unsupported type "strin"'),
    ([], "Schema should be an object"),
    ({"$ref": "#/$defs/x"}, "Cannot find field"),
    ({"$ref": "http://a.b/c"}, r"\$ref: only references inside"),
    ({"not": {"type": "string"}}, "not: it is not supported"),
    ({"if": {"type": "string"}}, "if: it is not supported"),
    ({"contains": {"const": 1}}, "contains: it is not supported"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems: it is not supported"),
    ({"type": "object", "properties": {"a": {"type": "number", "multipleOf": 0.5}}}, r"properties\.a\.multipleOf: it is not"),
    ({"type": "array", "prefixItems": [{}, {"minLength": 3}]}, r"prefixItems\[1\]\.minLength: .* without a type"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"dependentRequired": {"a": ["b"]}, "type": "object"}}}, r"\$defs/a\.dependent"),
    ({"$ref": "#/$defs/a", "maxLength": 3, "$defs": {"a": {"type": "string"}}}, r"maxLength: it is not supported beside \$ref"),
    ({"allOf": [{"type": "string"}, {"minLength": 3}]}, "allOf: of several schemas"),
    ({"type": "object", "anyOf": [{"required": ["a"]}]}, "type: it is not supported beside anyOf"),
    ({"type": "integer", "enum": [1, "x"]}, "enum: 'x' is not of the type beside it"),
    ({"type": "boolean", "const": 1}, "const: 1 is not of the type beside it"),
    ({"type": "object", "required": ["z"]}, "required: 'z' is not among the properties"),
    ({"properties": {"a": {}}, "patternProperties": {"b": {}}}, "patternProperties: it is not supported beside properties"),
    ({"additionalProperties": {}, "minProperties": 2}, "minProperties: above 1 it is not supported where names are free"),
    ({"type": "string", "pattern": "a(?!b)"}, "pattern: .* such as a lookahead"),
    ({"type": "string", "pattern": "^a|b$"}, r"pattern: .* put the whole into \^\(\?:…\)\$"),
    ({"type": "string", "pattern": "a^b"}, "pattern: .* has an anchor for a part of it"),
    ({"propertyNames": {"title": "Name"}, "type": "object"}, "propertyNames: it says nothing"),
    ({"propertyNames": {"maxLength": 1}, "additionalProperties": False}, "propertyNames: .* beside additionalProperties"),
    ({"patternProperties": {"a": {}}, "additionalProperties": False, "minProperties": 2}, "minProperties: above 1"),
    ({"type": 5, "required": 0, "properties": 1, "enum": 2}, "properties: it is not supported beside enum"),
    ({"type": "string", "pattern": "a", "maxLength": 2}, "maxLength: it is not supported beside pattern"),
    ({"type": "string", "pattern": "("}, "parenthesis is not closed"),
    (nested(70), "more than 64 schemas inside each other"),
    ({"$defs": {str(n): {"$ref": f"#/$defs/{n + 1}"} for n in range(600)}, "$ref": "#/$defs/0"}, "more than 500 places"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_would_not_be_kept_to_is_refused(library: Library, schema: Any, said: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^The JSON schema (cannot be used: .*|has |refers to )?{said}") as refused:
        matcher_of(library, structured.json_schema(schema))
    assert refused.value.param == "grammar"
    assert refused.value.fix


@pytest.mark.parametrize(
    ("kind", "source", "said"),
    [
        ("regex", "a(?=b)", "The regular expression cannot be used: .*Lookahead is not supported"),
        ("regex", "(", "The regular expression cannot be used: .*parenthesis is not closed"),
        ("grammar", 'foo ::= "a"', 'The grammar cannot be used: .*rule with name "root" is not found'),
        ("json_schema", "{", "The JSON schema is not valid JSON"),
        ("json_schema", "[" * 200_000, "The JSON schema is not valid JSON"),
        ("json_object", "{}", "'json_object' has a source"),
        ("choice", "yes", "not a JSON list of texts"),
        ("choice", "[]", "not a JSON list of texts"),
        ("choice", "[1]", "not a JSON list of texts"),
        ("json_schema", '{"$ref": "#"}', "The JSON schema (allows no text|cannot be used)"),
        ("regex", "a" * 300_000, "has 300000 characters"),
    ],
)
def test_sources_that_are_none_are_refused(library: Library, kind: str, source: str, said: str) -> None:
    from fluentllm.plugins.grammar_xgrammar.compiler import Compiler

    with pytest.raises(InvalidRequest, match=said) as refused:
        Compiler(kind, library).compile(source)
    assert "/project/" not in str(refused.value)


@pytest.mark.parametrize(("limit", "most"), [(0, 0), (2, 2), (None, 300)])
def test_white_space_is_bounded(limit: int | None, most: int) -> None:
    from fluentllm.plugins.grammar_xgrammar.compiler import Library

    path = resolve("longcat-nano").path
    library, [space] = Library(context(path, NANO, (EOS,)), limit), load_tokenizer(path).encode("\n")
    for spec in (structured.json_object(), structured.json_schema({"type": "array", "items": {}})):
        matcher = matcher_of(library, spec)
        assert all(map(matcher.accept, load_tokenizer(path).encode("{" if spec.kind == "json_object" else "[")))
        assert sum(matcher.accept(space) for _ in range(300)) == most


def test_transformers_is_not_needed() -> None:
    """Where it is not installed xgrammar is imported without, and nobody finds a Transformers that is none."""
    code = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.split(".")[0] == "transformers" else find(name, *rest)
from fluentllm.plugins.grammar_xgrammar.library import load_xgrammar
xgrammar = load_xgrammar()
info = xgrammar.TokenizerInfo([b"a", b"b", b""], stop_token_ids=[2])
matcher = xgrammar.GrammarMatcher(xgrammar.GrammarCompiler(info).compile_regex("ab"))
print(matcher.accept_token(0), matcher.accept_token(0), matcher.accept_token(1), "transformers" in sys.modules)
assert load_xgrammar() is xgrammar
try:
    import transformers
except ImportError:
    print("not installed")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "False", "True", "False", "not", "installed"]
