"""Tokenizers out of GGUF files, against the tokenizers that the files were made from; SmolLM2 against Transformers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer as Backend, normalizers, pre_tokenizers

from fluentllm.core.errors import CheckpointError
from fluentllm.frontend.tokenizer import load_tokenizer
from fluentllm.hub.gguf_file import read_header

from .checkpoints import SPECIAL, byte_level, sentencepiece_like
from .texts import ODD, random_texts, spliced_texts


def write_gguf(path: Path, backend: Backend, kind: str, pre: str | None = None, **fields: Any) -> Path:
    """A file with the tokenizer of `backend` and no tensors."""
    state = json.loads(backend.to_str())
    vocab = backend.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.__getitem__)
    special = {token["content"] for token in state["added_tokens"]}
    types = gguf.TokenType
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    merges = [tuple(merge) for merge in state["model"]["merges"]]
    if kind == "gpt2":
        writer.add_token_types([types.CONTROL if token in special else types.NORMAL for token in tokens])
        writer.add_token_merges([" ".join(merge) for merge in merges])
    else:
        ranks = {"".join(merge): -float(rank) for rank, merge in reversed(list(enumerate(merges)))}
        writer.add_token_scores([ranks.get(token, -1e6) for token in tokens])
        byte = {f"<0x{n:02X}>" for n in range(256)}
        writer.add_token_types(
            [
                types.UNKNOWN
                if token == "<unk>"
                else types.CONTROL
                if token in special
                else types.BYTE
                if token in byte
                else types.NORMAL
                for token in tokens
            ]
        )
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    for name, value in fields.items():
        {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}[type(value)](f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def _split(pattern: str) -> list[Any]:
    from tokenizers import Regex

    return [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
AS_IN_TOKENIZER_JSON = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)],
    "llama-bpe": _split(_WORDS % "{1,3}"),
    "qwen2": _split(_WORDS % ""),
}
"""The pre-tokenizers of GPT-2's, SmolLM2's, Llama 3's and Qwen2's own tokenizer.json."""


@pytest.mark.parametrize("pre", AS_IN_TOKENIZER_JSON)
def test_byte_level_gguf_is_the_tokenizer_it_was_made_from(tmp_path: Path, pre: str) -> None:
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.Sequence(AS_IN_TOKENIZER_JSON[pre])
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    ours = load_tokenizer(write_gguf(tmp_path / "x.gguf", backend, "gpt2", pre, eos_token_id=2, eot_token_id=0, bos_token_id=1))
    assert ours.eos_ids == (2, 0)
    assert ours.special_ids == {0, 1, 2}
    for text in [*ODD, *random_texts(1), *SPECIAL]:
        assert ours.encode(text, add_special_tokens=False) == backend.encode(text).ids, text
        assert ours.encode(text)[:1] == [1] if pre == "llama-bpe" else True
        assert ours.decode(ours.encode(text), skip_special_tokens=False) == backend.decode(
            ours.encode(text), skip_special_tokens=False
        )


def test_llama3_takes_a_word_that_is_a_token_whole(tmp_path: Path) -> None:
    """Its vocabulary has tokens that no merges lead to."""
    state = json.loads(byte_level().to_str())
    state["model"]["vocab"]["xyzzy"] = 400
    backend = Backend.from_str(json.dumps(state))
    for pre, ids in (("llama-bpe", [400]), ("gpt-2", backend.encode("xyzzy").ids)):
        ours = load_tokenizer(write_gguf(tmp_path / f"{pre}.gguf", backend, "gpt2", pre))
        assert ours.encode("xyzzy") == ids
    assert len(ids) > 1


def test_no_pre_tokenizer_named_is_the_default(tmp_path: Path) -> None:
    ours = load_tokenizer(write_gguf(tmp_path / "x.gguf", byte_level(), "gpt2"))
    texts = [ours.backend.pre_tokenizer.pre_tokenize_str(text) for text in ("1234 fox's", "a.b")]
    assert [[piece for piece, _ in text] for text in texts] == [["123", "4", "Ġfox", "'", "s"], ["a", ".", "b"]]


@pytest.mark.parametrize("shuffled", [False, True])
def test_sentencepiece_gguf_is_the_tokenizer_it_was_made_from(tmp_path: Path, shuffled: bool) -> None:
    """Whether ids follow the scores, as they mostly do, or not."""
    backend = sentencepiece_like()
    if shuffled:
        state = json.loads(backend.to_str())
        vocab = state["model"]["vocab"]
        learned = sorted(vocab.values())[3 + 256 :]
        moved = dict(zip(learned, random.Random(4).sample(learned, len(learned)), strict=True))
        state["model"]["vocab"] = {token: moved.get(i, i) for token, i in vocab.items()}
        backend = Backend.from_str(json.dumps(state))
    ours = load_tokenizer(write_gguf(tmp_path / "x.gguf", backend, "llama", bos_token_id=1, eos_token_id=2))
    assert ours.encode("Hi")[0] == 1
    assert ours.trims_first_space
    for text in [*ODD, *random_texts(2), *spliced_texts(3), "<s>x</s> y"]:
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == backend.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ids, skip_special_tokens=False) == backend.decode(ids, skip_special_tokens=False)


def test_sentencepiece_without_a_space_before(tmp_path: Path) -> None:
    ours = load_tokenizer(
        write_gguf(
            tmp_path / "x.gguf", sentencepiece_like(), "llama", bos_token_id=1, add_space_prefix=False, add_bos_token=False
        )
    )
    assert ours.token_text(ours.encode("The fox")[0])[:1] == "T"
    assert ours.decode(ours.encode(" The fox")) == " The fox"


@pytest.mark.parametrize(
    ("kind", "pre", "words"), [("gpt2", "falcon9", "'falcon9'"), ("bert", None, "'bert'"), ("gpt2", "tekken", "smollm")]
)
def test_unknown_kinds_are_refused_by_name(tmp_path: Path, kind: str, pre: str | None, words: str) -> None:
    path = write_gguf(tmp_path / "x.gguf", byte_level(), "gpt2", pre)
    if kind != "gpt2":
        path.write_bytes(path.read_bytes().replace(b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0" + kind.encode()))
    with pytest.raises(CheckpointError, match=words):
        load_tokenizer(path)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "x.gguf", byte_level(), "gpt2", "gpt-2").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in (0, 3, 4, 20, 100, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            load_tokenizer(cut)
    cut.write_bytes(b"GGUF\x09" + whole[5:])
    with pytest.raises(CheckpointError, match="version 9"):
        load_tokenizer(cut)
    rng = random.Random(3)
    for _ in range(60):  # whatever the damage, the error is typed
        broken = bytearray(whole[: rng.randrange(8, 3000)])
        broken[rng.randrange(len(broken))] = rng.randrange(256)
        cut.write_bytes(broken)
        with pytest.raises(CheckpointError):
            load_tokenizer(cut)


@pytest.mark.usefixtures("quick_gguf")
def test_the_header_reads_as_the_gguf_package_reads_it(smollm2_file: Path) -> None:
    ours = read_header(smollm2_file).metadata
    theirs = {
        name: field.contents() for name, field in gguf.GGUFReader(smollm2_file).fields.items() if not name.startswith("GGUF.")
    }
    assert ours == theirs


# ----------------------------------------------------------------------------------------------------------------- SmolLM2
def test_smollm2_against_its_tokenizer_json(smollm2_file: Path) -> None:
    """The same vocabulary and merges in the pre-tokenizer that SmolLM2's tokenizer.json spells out; and against what
    Transformers makes of the file, where text has no digits (it reads `smollm` as GPT-2's rule, which keeps them together)."""
    ours = load_tokenizer(smollm2_file)
    assert (ours.vocab_size, ours.bos_id, ours.eos_ids) == (49152, 1, (2,))
    assert ours.encode("The capital of France is Paris.") == [504, 3575, 282, 4649, 314, 7042, 30]
    state = json.loads(ours.backend.to_str())
    digits, byte_level_ = AS_IN_TOKENIZER_JSON["smollm"]
    reference = Backend.from_str(json.dumps(state))
    reference.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level_])
    for text in [*ODD, *random_texts(5)]:
        assert ours.encode(text) == reference.encode(text).ids, text
        assert ours.decode(ours.encode(text), skip_special_tokens=False) == text


@pytest.mark.usefixtures("quick_gguf")
def test_smollm2_against_transformers(smollm2_file: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = load_tokenizer(smollm2_file)
    theirs = transformers.AutoTokenizer.from_pretrained(str(smollm2_file.parent), gguf_file=smollm2_file.name)
    for text in [*ODD, *random_texts(6)]:
        undigited = "".join(char for char in text if not char.isnumeric())
        assert ours.encode(undigited) == theirs.encode(undigited), undigited
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    assert ours.chat_template == theirs.chat_template
    from fluentllm.frontend.templates import ChatTemplate

    rendered = ChatTemplate(ours.chat_template or "", ours.special.names).render(messages)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]
    assert ours.encode(rendered, add_special_tokens=False) == expected
