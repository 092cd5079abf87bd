"""Loading tokenizers from folders and GGUF files; every kind against the library's own whole-text encoding and decoding."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import processors

from fluentllm.core.errors import CheckpointError, InvalidRequest
from fluentllm.frontend.tokenizer import Tokenizer, bytes_tokenizer, load_tokenizer

from .checkpoints import CHATML, byte_level, write_chat_folder, write_folder
from .texts import ODD, random_texts


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
