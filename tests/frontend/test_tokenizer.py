"""Loading tokenizers from folders and GGUF files; every kind against the library's own whole-text encoding and decoding."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import Tokenizer as Backend, normalizers, pre_tokenizers, processors

from fluentllm.core.errors import CheckpointError, InvalidRequest
from fluentllm.frontend.gguf_metadata import read_metadata
from fluentllm.frontend.tokenizer import Tokenizer, bytes_tokenizer, load_tokenizer

from .checkpoints import CHATML, SPECIAL, TEXT, byte_level, sentencepiece_like, write_chat_folder, write_folder

ODD = [
    "", " ", "  ", "\n\n\t x", "naïve café",
    "e\u0301 ≠ é", "👩‍👩‍👧 🙂🏽", "日本語 русский العربية", "½ ² ٣ 12345", "\x00\x1f\x7f", "\ufeff\u200d\u00a0\u3000",
    "don't I'LL we’ve", "<|im_start|>user", "a\ufffdb", "𝔘𝔫𝔦 \U0010ffff",
]  # fmt: skip


@pytest.mark.parametrize("text", ODD)
def test_odd_unicode_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
    assert (joined.removeprefix(" ") if tokenizer.trims_first_space else joined) == text


@settings(max_examples=150, deadline=None)
@given(st.text())
def test_any_text_comes_back(bytelevel: Tokenizer, text: str) -> None:
    ids = bytelevel.encode(text)
    assert b"".join(map(bytelevel.token_bytes, ids)).decode() == text == bytelevel.decode(ids, skip_special_tokens=False)
    assert bytelevel.least_tokens(text) <= len(ids)


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="not valid Unicode"):
        tokenizer.encode("a\ud800b")


def test_what_the_files_say(tmp_path: Path) -> None:
    generation = {"eos_token_id": [2, 0, 2]}
    tokenizer = load_tokenizer(
        write_folder(
            tmp_path,
            byte_level(),
            generation,
            bos_token="<|im_start|>",
            eos_token={"content": "<|im_end|>", "special": True},
            pad_token=None,
            chat_template=CHATML,
            added_tokens_decoder={"400": {"content": "<tool>", "special": True}},
        )
    )
    assert tokenizer.bos_id == 1
    assert tokenizer.eos_ids == (2, 0)
    assert tokenizer.special.names == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert tokenizer.chat_template == CHATML
    assert tokenizer.encode("<tool>") == [400]
    assert tokenizer.vocab_size == 401
    assert tokenizer.special_ids == {0, 1, 2, 400}


def test_a_template_file_outranks_the_config(tmp_path: Path) -> None:
    folder = write_chat_folder(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert load_tokenizer(folder).chat_template == "{{ messages }}"
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    assert load_tokenizer(write_chat_folder(tmp_path / "named", chat_template=named)).chat_template == "b"


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, False), (True, True), (False, True)])
def test_what_frames_text(tmp_path: Path, bos: bool, eos: bool) -> None:
    """tokenizer.json says it; but of Llama's classes the config does, if it states it."""
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    stated = {**names, "add_bos_token": bos, "add_eos_token": eos}
    llama = load_tokenizer(write_folder(tmp_path, backend, **stated, tokenizer_class="LlamaTokenizerFast"))
    inner = llama.encode("Hi", add_special_tokens=False)
    assert llama.encode("Hi") == [1] * bos + inner + [2] * eos
    for config in ({**stated, "tokenizer_class": "Qwen2Tokenizer"}, stated, {**names, "tokenizer_class": "LlamaTokenizerFast"}):
        assert load_tokenizer(write_folder(tmp_path, backend, **config)).encode("Hi") == [0, *inner]


def test_a_folder_encodes_as_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    config = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    folder = write_folder(tmp_path, backend, **config, added_tokens_decoder={"400": {"content": "<tool>", "special": False}})
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(str(folder))
    for text in [*ODD, *random_texts(7, 100), "<tool> x<|pad|>y<|im_end|>"]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_unusable_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tokenizer(tmp_path)
    write_folder(tmp_path, byte_level())
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not an object"):
        load_tokenizer(tmp_path)


def test_padding_and_truncation_of_the_file_do_not_apply(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=32)
    tokenizer = load_tokenizer(write_folder(tmp_path, backend))
    assert tokenizer.decode(tokenizer.encode("The quick brown fox jumps")) == "The quick brown fox jumps"


def test_dummy_weights_speak_bytes() -> None:
    tokenizer = bytes_tokenizer()
    assert tokenizer.encode("né") == [*"né".encode()]
    assert tokenizer.decode([*"né".encode()]) == "né"


# --------------------------------------------------------------------------------------------------------------------- GGUF
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


def random_texts(seed: int, count: int = 400) -> list[str]:
    rng = random.Random(seed)
    letters = [
        *"abc ABC \n\t\r'sle1234½²٣一龥é\u0301🙂👩\u200d\u00a0\u3000.,!?<|>_-ſ\x00",
        "don't",
        "  ",
        "\n\n",
        "12345",
        "I'LL",
        " the",
    ]
    return ["".join(rng.choices(letters, k=rng.randint(0, 30))) for _ in range(count)]


def spliced_texts(seed: int, count: int = 300) -> list[str]:
    """Scraps of what the tokenizers learned from, where merges compete."""
    rng, source = random.Random(seed), TEXT[0] + TEXT[1]
    starts = range(len(source))
    return ["".join(source[i : i + rng.randint(1, 6)] for i in rng.choices(starts, k=12)) for _ in range(count)]


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


def test_the_header_reads_as_the_gguf_package_reads_it(smollm2_file: Path) -> None:
    ours = read_metadata(smollm2_file)
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
