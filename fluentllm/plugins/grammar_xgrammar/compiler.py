"""From a grammar's text to xgrammar's automaton over the model's tokens; what the library would not keep to is refused."""

from __future__ import annotations

import json
import os
import re
from functools import partial
from typing import TYPE_CHECKING, Any

from ...core.errors import InvalidRequest, PluginError
from .matcher import CompiledGrammar
from .schema import check_schema
from .structural_tag import read_structural_tag

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fluentllm.frontend.tokenizer import Tokenizer

    from ...core.protocols import GrammarContext

MAX_SOURCE = 1 << 18
"""Characters of a grammar; others wait while one is compiled."""
MAX_THREADS = 8
CACHE_BYTES = 64 * 2**20
"""Of the library's own cache. The engine keeps whole grammars; this has the parts that they share, and that one repeats."""
_PLACE = re.compile(r"^\[[\d:]+\] \S+:\d+: (?:Check failed: .*? is false: )?")
"""What the library writes before a reason: the time, and a place in its own source."""
_NOUNS = {"json_schema": "JSON schema", "regex": "regular expression", "structural_tag": "structural tag"}
_PLAIN = re.compile(r"[A-Za-z0-9 _.,:;!?'()/+*=<>@#%&~-]")


class Library:
    """xgrammar, told the model's tokens."""

    def __init__(self, context: GrammarContext, max_whitespace: int | None) -> None:
        """Raises `InvalidRequest` for a model whose tokens cannot be spelt or that has no end, `PluginError` if the library
        cannot be imported."""
        from fluentllm.frontend.services import load_model_tokenizer

        from .library import load_xgrammar

        try:
            self.xgrammar = load_xgrammar()
        except ImportError as error:
            raise PluginError(
                f"xgrammar cannot be imported: {error}.", fix="pip install 'fluentllm[grammar]'", param="grammar"
            ) from error
        self.max_whitespace = max_whitespace
        size = context.spec.vocab_size
        self.words = -(-size // 32)
        tokenizer = load_model_tokenizer(context.settings, context.path)
        self.ends = frozenset(token for token in (*context.spec.eos_token_ids, *tokenizer.eos_ids) if token < size)
        if not self.ends:
            raise InvalidRequest("This model has no end-of-sequence token, so no grammar can end its text.", param="grammar")
        self._tokenizer, self._size = tokenizer, size
        self.compiler = self._compiler_with(frozenset())
        self._spelling: tuple[frozenset[int], Any] = frozenset(), self.compiler

    def spelling(self, texts: Iterable[str]) -> Any:
        """A compiler for which those special tokens stand for their text that are these texts. A model's are always the same,
        so the last one is kept."""
        tokens = frozenset(token for token in self._tokenizer.special_tokens(texts) if token < self._size) - self.ends
        if not tokens:
            return self.compiler
        if self._spelling[0] != tokens:
            self._spelling = tokens, self._compiler_with(tokens)
        return self._spelling[1]

    def _compiler_with(self, spelt: frozenset[int]) -> Any:
        words = vocabulary(self._tokenizer, self._size)
        for token in spelt:
            words[token] = self._tokenizer.token_bytes(token)
        about = self.xgrammar.TokenizerInfo(
            words, self.xgrammar.VocabType.RAW, vocab_size=self._size, stop_token_ids=sorted(self.ends)
        )
        threads = min(MAX_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        return self.xgrammar.GrammarCompiler(about, max_threads=threads, cache_limit_bytes=CACHE_BYTES)

    def json_schema(self, schema: str) -> Any:
        """Of an object nothing but what the schema declares. `schema`: JSON."""
        if self.max_whitespace == 0:
            return self.compiler.compile_json_schema(schema, any_whitespace=False, separators=(",", ":"))
        return self.compiler.compile_json_schema(schema, max_whitespace_cnt=self.max_whitespace)


def vocabulary(tokenizer: Tokenizer, size: int) -> list[bytes]:
    """Bytes of the tokens 0 … `size` - 1. None for ids without a token, as those that pad the model's vocabulary, and for
    special tokens, which stand for no text: neither are ever allowed, unless they end it. Raises `InvalidRequest`."""
    from fluentllm.frontend.tokenizer import OTHER

    if tokenizer.kind == OTHER:
        raise InvalidRequest(
            "Grammars are not available for this model: its tokenizer's decoder does not tell the bytes of a token.",
            param="grammar",
        )
    special = tokenizer.special_ids
    return [b"" if token in special else tokenizer.token_bytes(token) for token in range(size)]


class Compiler:
    """Of grammars of one kind."""

    def __init__(self, kind: str, library: Library) -> None:
        self._library = library
        compiler = library.compiler
        self._compile = {
            "json_object": self._json_object,
            "json_schema": self._json_schema,
            "regex": compiler.compile_regex,
            "choice": self._choice,
            "grammar": compiler.compile_grammar,
            "structural_tag": self._structural_tag,
        }[kind]
        self._noun = _NOUNS.get(kind, "grammar")

    def compile(self, source: str) -> CompiledGrammar:
        if len(source) > MAX_SOURCE:
            raise InvalidRequest(
                f"The {self._noun} has {len(source)} characters; at most {MAX_SOURCE} are taken.",
                fix="Shorten it.",
                param="grammar",
            )
        try:
            compiled = self._compile(source)
        except RuntimeError as error:  # the library raises nothing finer
            reason = _PLACE.sub("", str(error)).strip().rstrip(".")
            raise InvalidRequest(
                f"The {self._noun} cannot be used: {reason}.",
                fix="Correct it, or leave out what is not supported.",
                param="grammar",
            ) from error
        grammar = CompiledGrammar(partial(self._library.xgrammar.GrammarMatcher, compiled), self._library.ends)
        if not grammar.begins(self._library.words):
            raise InvalidRequest(f"The {self._noun} allows no text.", fix="Correct it.", param="grammar")
        return grammar

    def _json_object(self, source: str) -> Any:
        if source:
            raise InvalidRequest(
                "A grammar of the kind 'json_object' has a source.",
                fix="Leave it empty, or ask for json_schema.",
                param="grammar",
            )
        return self._library.json_schema('{"type": "object"}')

    def _json_schema(self, source: str) -> Any:
        try:
            schema = json.loads(source)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"The JSON schema is not valid JSON: {error}.", fix="Correct it.", param="grammar") from None
        check_schema(schema)
        return self._library.json_schema(source)

    def _structural_tag(self, source: str) -> Any:
        tag, special_tokens = read_structural_tag(source, self._library.xgrammar, self._library.max_whitespace)
        return self._library.spelling(special_tokens).compile_structural_tag(tag)

    def _choice(self, source: str) -> Any:
        try:
            choices = json.loads(source)
        except (ValueError, RecursionError):
            choices = None
        if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
            raise InvalidRequest(
                "The source of a grammar of the kind 'choice' is not a JSON list of texts.",
                fix='Write it like ["yes", "no"].',
                param="grammar",
            )
        return self._library.compiler.compile_grammar("root ::= " + " | ".join(map(_literal, choices)))


def _literal(text: str) -> str:
    return '"' + "".join(char if _PLAIN.match(char) else f"\\U{ord(char):08X}" for char in text) + '"'
