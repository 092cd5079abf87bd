"""`fluent models list|pull|show`, as a user types it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from fluentllm.cli import main
from fluentllm.hub import resolve

from .conftest import write_gguf

if TYPE_CHECKING:
    from pathlib import Path

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


class Fluent:
    """Runs `fluent` in this process; remembers what it printed and how it ended."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self.capture = capture

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["models", *arguments])
        out, err = self.capture.readouterr()
        return int(ended.value.code or 0), out, err

    def json(self, *arguments: str) -> Any:
        status, out, err = self(*arguments, "--json")
        assert status == 0, err
        return json.loads(out)


@pytest.fixture
def fluent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Fluent:
    monkeypatch.setenv("FLUENT_PLUGINS", "")
    return Fluent(capsys)


def folder_of(path: Path, *, weights: bool = True, **config: Any) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**LLAMA, **config}))
    if weights:
        save_file({"a": torch.zeros(3, 5), "b": torch.zeros(2)}, path / "model.safetensors")
    return path


def test_list(fluent: Fluent) -> None:
    path = str(resolve("smollm2").path)
    smollm2 = next(model for model in fluent.json("list") if model["name"] == "smollm2")
    assert (smollm2["cached"], smollm2["bytes"], smollm2["path"]) == (True, 98_362_432, path)
    status, out, _ = fluent("list")
    assert status == 0
    assert path in out


def test_list_says_how_to_get_what_is_not_here(fluent: Fluent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUENT_CACHE", str(tmp_path))
    assert "not here yet: fluent models pull smollm2" in fluent("list")[1]
    smollm2 = next(model for model in fluent.json("list") if model["name"] == "smollm2")
    assert (smollm2["cached"], smollm2["path"]) == (False, None)


def test_pull_prints_where_it_is(fluent: Fluent) -> None:
    path = str(resolve("smollm2").path)
    assert fluent("pull", "smollm2")[1] == path + "\n"
    assert fluent.json("pull", "smollm2") == {"name": "smollm2", "path": path, "kind": "gguf"}


def test_show_the_default(fluent: Fluent) -> None:
    about = fluent.json("show", "smollm2")
    assert about["plugin"] == "model_llama"
    assert about["unsupported_because"] is None
    assert (about["layers"], about["parameters"], about["chat_template"]) == (30, 134_515_008, True)


def test_show_a_folder(fluent: Fluent, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "mine")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    status, out, _ = fluent("show", str(folder))
    assert status == 0
    lines = dict(line.split("  ", 1) for line in out.splitlines())
    shown = {key: value.strip() for key, value in lines.items()}
    assert shown["runs with"] == "model_llama"
    assert shown["parameters"] == "17"
    assert shown["heads"] == "4 (2 for keys and values)"
    assert shown["tokenizer"] == "tokenizers"
    assert shown["chat template"] == "yes"
    assert shown["format"] == "safetensors"


def test_show_a_folder_without_weights(fluent: Fluent, tmp_path: Path) -> None:
    about = fluent.json("show", str(folder_of(tmp_path / "mine", weights=False)))
    assert (about["format"], about["parameters"], about["bytes"]) == ("config only", None, 0)
    assert (about["tokenizer"], about["chat_template"]) == (None, False)


def test_show_an_architecture_that_no_plugin_knows(fluent: Fluent, tmp_path: Path) -> None:
    about = fluent.json("show", str(folder_of(tmp_path / "mine", architectures=["MambaForCausalLM"])))
    assert about["plugin"] is None
    assert "no plugin knows MambaForCausalLM; known are " in about["unsupported_because"]


def test_show_what_the_plugin_refuses(fluent: Fluent, tmp_path: Path) -> None:
    """The model family itself is asked, so the reason is the one that serving would give."""
    about = fluent.json("show", str(folder_of(tmp_path / "mine", hidden_act="swirl")))
    assert about["plugin"] == "model_llama"
    assert "'swirl'" in about["unsupported_because"]


def test_show_a_gguf(fluent: Fluent, tmp_path: Path) -> None:
    about = fluent.json("show", str(write_gguf(tmp_path / "tiny.gguf", template="{{ messages }}")))
    assert (about["name"], about["format"], about["quantization"]) == ("tiny", "gguf", "F32")
    assert about["parameters"] == 96 * 32 + 32
    assert about["chat_template"]


def test_errors_end_without_a_traceback(fluent: Fluent, tmp_path: Path) -> None:
    status, _, err = fluent("show", "smolm2")
    assert status == 2
    assert err.splitlines()[0] == "error: Unknown model 'smolm2'."
    assert "Did you mean 'smollm2'?" in err
    folder = folder_of(tmp_path / "mine")
    (folder / "model.safetensors").write_bytes(b"\xff" * 20)
    assert "cut off or damaged" in fluent("show", str(folder))[2]
