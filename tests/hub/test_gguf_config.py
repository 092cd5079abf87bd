"""GGUF headers: read as the `gguf` package reads them, turned into a Hugging Face configuration, broken in every way."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest

from fluentllm.core.errors import CheckpointError
from fluentllm.hub.config import config_at
from fluentllm.hub.gguf_config import config_from_header, llama3_divisors
from fluentllm.hub.gguf_file import read_header

from .conftest import write_gguf

if TYPE_CHECKING:
    from pathlib import Path


def build(path: Path, layout: str = "llama", tensors: dict[str, np.ndarray] | None = None, **keys: Any) -> Path:
    """A header with the keys that every layout needs, and the given ones (`__` for `.`) over them."""
    writer = gguf.GGUFWriter(str(path), layout)
    needed: dict[str, Any] = {
        "block_count": 2,
        "context_length": 4096,
        "embedding_length": 64,
        "feed_forward_length": 128,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-6,
    }
    needed |= {key.replace("__", "."): value for key, value in keys.items()}
    for key, value in needed.items():
        full = key if key.startswith("tokenizer.") else f"{layout}.{key}"
        if isinstance(value, str):
            writer.add_string(full, value)
        elif isinstance(value, float):
            writer.add_float32(full, value)
        elif isinstance(value, list):
            writer.add_array(full, value)
        elif value is not None:
            writer.add_uint32(full, value)
    for name, tensor in {"token_embd.weight": np.zeros((10, 64), dtype=np.float32), **(tensors or {})}.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_header_is_what_the_gguf_package_reads(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", template="{{ 'é' }}")
    theirs, ours = gguf.GGUFReader(path), read_header(path)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata.keys() == fields.keys()
    for key, value in fields.items():
        assert ours.metadata[key] == pytest.approx(value), key
    assert {t.name: (t.type, t.shape, t.offset) for t in ours.tensors.values()} == {
        t.name: (t.tensor_type, tuple(int(n) for n in reversed(t.shape)), t.data_offset) for t in theirs.tensors
    }


def test_every_kind_of_value(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    values: dict[str, Any] = {}
    for kind, value in (
        ("uint8", 200), ("int8", -100), ("uint16", 60000), ("int16", -30000), ("uint32", 4_000_000_000), ("int32", -5),
        ("uint64", 1 << 60), ("int64", -(1 << 60)), ("float32", 0.5), ("float64", 1e300), ("bool", True), ("string", "größer"),
    ):  # fmt: skip
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
        values[f"x.{kind}"] = value
    for name, array in {"ints": [1, 2, 3], "floats": [0.5, 2.0], "strings": ["a", "ü"], "nested": [[1], [2, 3]]}.items():
        writer.add_array(f"x.{name}", array)
        values[f"x.{name}"] = array
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_header(path).metadata == {"general.architecture": "llama", **values}


@pytest.mark.parametrize(
    ("layout", "architecture"),
    [("llama", "LlamaForCausalLM"), ("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM")],
)
def test_layouts(tmp_path: Path, layout: str, architecture: str) -> None:
    keys = {"rope__freq_base": 1e6, "attention__key_length": 32, "attention__value_length": 32}
    config = config_at(build(tmp_path / "m.gguf", layout, **keys))
    expected = {
        "architectures": [architecture],
        "head_dim": 32,
        "num_key_value_heads": 2,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "vocab_size": 10,
        "intermediate_size": 128,
        "rope_scaling": None,
    }
    assert {key: config[key] for key in expected} == expected


def test_head_counts_given_for_each_layer(tmp_path: Path) -> None:
    config = config_at(build(tmp_path / "m.gguf", attention__head_count_kv=[2, 2]))
    assert config["num_key_value_heads"] == 2
    with pytest.raises(CheckpointError, match=r"\[2, 4\] as 'llama\.attention\.head_count_kv'"):
        config_at(build(tmp_path / "n.gguf", attention__head_count_kv=[2, 4]))


def test_experts(tmp_path: Path) -> None:
    keys = {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 32}
    config = config_at(build(tmp_path / "m.gguf", "qwen3moe", **keys))
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert (config["num_experts"], config["num_experts_per_tok"], config["moe_intermediate_size"]) == (8, 2, 32)
    assert config_at(build(tmp_path / "n.gguf", expert_count=8))["architectures"] == ["MixtralForCausalLM"]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rope__scaling__type": "none"}, None),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope__scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 4.0,
                "rope__scaling__original_context_length": 1024,
                "rope__scaling__attn_factor": 1.1,
                "rope__scaling__yarn_beta_fast": 32.0,
            },
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 1024,
                "attention_factor": 1.1,
                "beta_fast": 32.0,
            },
        ),
    ],
)
def test_rope_scalings(tmp_path: Path, keys: dict[str, Any], expected: dict[str, Any] | None) -> None:
    assert config_at(build(tmp_path / "m.gguf", "qwen2", **keys))["rope_scaling"] == expected


def test_unknown_rope_scalings_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'spiral'"):
        config_at(build(tmp_path / "m.gguf", rope__scaling__type="spiral", rope__scaling__factor=2.0))
    long = {"rope_factors_long.weight": np.ones(8, dtype=np.float32)}
    with pytest.raises(CheckpointError, match="'longrope'"):
        config_at(build(tmp_path / "n.gguf", tensors=long))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_found_again_from_its_divisors(tmp_path: Path, factor: float) -> None:
    """The file holds what Transformers divides its frequencies by."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    theirs = LlamaConfig(
        hidden_size=512, num_attention_heads=4, max_position_embeddings=131072, rope_parameters={**scaling, "rope_theta": 5e5}
    )
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, device="cpu")
    plain = 5e5 ** (-np.arange(0, 128, 2) / 128)
    divisors = (plain / frequencies.numpy()).astype(np.float32)
    assert divisors == pytest.approx(llama3_divisors(scaling, 5e5, 128), rel=1e-5)
    path = build(tmp_path / "m.gguf", tensors={"rope_freqs.weight": divisors}, rope__freq_base=5e5)
    found = config_at(path)["rope_scaling"]
    assert found is not None
    assert found.pop("factor") == pytest.approx(scaling.pop("factor"), rel=1e-5)
    assert found == scaling


def test_divisors_that_are_not_llama3s_are_refused(tmp_path: Path) -> None:
    tensors = {"rope_freqs.weight": np.linspace(1, 8, 64, dtype=np.float32)}
    with pytest.raises(CheckpointError, match=r"not Llama 3's"):
        config_at(build(tmp_path / "m.gguf", tensors=tensors, rope__freq_base=5e5))


def test_turn_ends_stop_too(tmp_path: Path) -> None:
    config = config_at(write_gguf(tmp_path / "m.gguf"))
    assert config["eos_token_id"] == [1, 2]


def test_an_unknown_layout_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'mamba'; known are llama, qwen2, qwen3, qwen3moe"):
        config_at(build(tmp_path / "m.gguf", "mamba"))


@pytest.mark.parametrize("key", ["block_count", "attention__head_count", "attention__layer_norm_rms_epsilon"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(CheckpointError, match=f"'llama.{key.replace('__', '.')}'"):
        config_at(build(tmp_path / "m.gguf", **{key: None}))


# ----------------------------------------------------------------------------------------------------------------- broken
def test_files_that_are_something_else(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for content in (b"", b"GG", b"PK\x03\x04 and more"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a GGUF file"):
            read_header(path)
    with pytest.raises(CheckpointError, match="Cannot read"):
        read_header(tmp_path / "absent.gguf")


def test_unknown_versions_and_byte_orders(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    content = bytearray(path.read_bytes())
    for version, seen in ((b"\x01\x00\x00\x00", "GGUF version 1"), (b"\x00\x00\x00\x03", "a big-endian GGUF")):
        content[4:8] = version
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=seen):
            read_header(path)


def test_a_header_cut_off_anywhere_is_an_error(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    content = path.read_bytes()
    end = min(tensor.offset for tensor in read_header(path).tensors.values())
    for length in range(0, end - 32, 7):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_header(path)


def test_damage_is_an_error_or_harmless_but_never_a_crash(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", template="x" * 50)
    content = path.read_bytes()
    end = min(tensor.offset for tensor in read_header(path).tensors.values())
    draw = random.Random(0)
    refused = 0
    for _ in range(500):
        damaged = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(4, end)] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            config_from_header(read_header(path))
        except CheckpointError:
            refused += 1
    assert refused > 50
