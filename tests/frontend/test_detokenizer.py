"""Incremental text against decoding everything at once; stop strings against looking at the whole text."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer as Backend, decoders, models, pre_tokenizers

from fluentllm.frontend.detokenizer import Detokenizer, StopStrings
from fluentllm.frontend.tokenizer import SpecialTokens, Tokenizer

from .checkpoints import TEXT


def pushed(tokenizer: Tokenizer, ids: list[int], *, skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 399), max_size=40))
def test_any_tokens_decode_as_all_at_once(bytelevel: Tokenizer, ids: list[int]) -> None:
    """Random ids are mostly broken UTF-8: what is none becomes U+FFFD, as when decoding everything."""
    assert "".join(pushed(bytelevel, ids)) == bytelevel.decode(ids)
    assert "".join(pushed(bytelevel, ids, skip=False)) == bytelevel.decode(ids, skip_special_tokens=False)


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 399), max_size=40), keep=st.frozensets(st.integers(0, 2)))
def test_special_tokens_that_are_kept_are_text(bytelevel: Tokenizer, ids: list[int], keep: frozenset[int]) -> None:
    assert bytelevel.special_ids == {0, 1, 2}
    detokenizer = Detokenizer(bytelevel, keep=keep)
    expected = bytelevel.decode([i for i in ids if i > 2 or i in keep], skip_special_tokens=False)
    assert "".join([*map(detokenizer.push, ids), detokenizer.flush()]) == expected
    assert bytelevel.special_tokens(["<|im_end|>", "x", "<|im_start|>"]) == {1, 2}


def test_no_broken_character_is_given(tokenizer: Tokenizer) -> None:
    text = "né 👩‍👩‍👧 你好 \U0010ffff\ufffd."
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = pushed(tokenizer, ids)
    assert len(ids) > len(text) / 2
    assert "".join(pieces).removeprefix(" " if tokenizer.trims_first_space else "") == text
    assert sum(piece.count("�") for piece in pieces) == 1
    assert pieces[-1] == ""


def test_an_unfinished_character_comes_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x🙂", add_special_tokens=False)[:-1]
    pieces = pushed(tokenizer, ids)
    assert "".join(pieces).strip() == "x�"
    assert pieces[-1] == "�"


def test_an_id_without_a_token_is_no_text(tokenizer: Tokenizer) -> None:
    assert pushed(tokenizer, [5000]) == ["", ""]


def test_a_decoder_without_bytes_of_its_own() -> None:
    backend = Backend(models.WordPiece({"[UNK]": 0, "un": 1, "##want": 2, "##ed": 3, "run": 4}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    tokenizer = Tokenizer(backend, SpecialTokens(), None)
    assert pushed(tokenizer, [1, 2, 3, 4]) == ["un", "want", "ed", " run", ""]


def test_smollm2_decodes_as_all_at_once(smollm2_file: Path) -> None:
    from fluentllm.frontend.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(smollm2_file)
    rng = random.Random(0)
    for _ in range(20):
        ids = [rng.randrange(49152) for _ in range(50)]
        assert "".join(pushed(tokenizer, ids)) == tokenizer.decode(ids)
        ids = tokenizer.encode(rng.choice(TEXT))
        assert "".join(pushed(tokenizer, ids)) == tokenizer.decode(ids)


# ------------------------------------------------------------------------------------------------------------ stop strings
def plain(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By the definition: read one character more until some stop string is complete."""
    for end in range(len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            longest = max(done, key=len)
            return text[: end - len(longest)], longest
    return text, None


letters = st.text(alphabet="ab\n", max_size=30)


@settings(max_examples=400, deadline=None)
@given(text=letters, stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=4), seed=st.integers(0, 9))
def test_stops_are_found_however_the_text_is_cut(text: str, stops: list[str], seed: int) -> None:
    rng = random.Random(seed)
    watch = StopStrings(stops)
    given_text, at = "", 0
    while at < len(text) and watch.hit is None:
        size = rng.randint(1, 4)
        given_text += watch.push(text[at : at + size])
        at += size
        assert text.startswith(given_text)
    if watch.hit is None:
        given_text += watch.flush()
    assert (given_text, watch.hit) == plain(text, stops)


@settings(max_examples=200, deadline=None)
@given(text=letters, stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), min_size=1, max_size=4))
def test_no_more_is_held_back_than_must_be(text: str, stops: list[str]) -> None:
    watch = StopStrings(stops)
    given_text = ""
    for end, char in enumerate(text, 1):
        given_text += watch.push(char)
        if watch.hit is not None:
            return
        held = text[:end].removeprefix(given_text)
        assert not held or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize("text", ["", "abc"])
def test_without_stops_everything_passes(text: str) -> None:
    watch = StopStrings([])
    assert watch.push(text) == text
    assert watch.flush() == ""
