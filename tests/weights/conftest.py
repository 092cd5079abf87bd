"""Small checkpoints to read: GGUF files written by the `gguf` package, safetensors written by `safetensors`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, LAYERS = 256, 4, 2, 64, 512, 96, 2

PYTHON_CANNOT_QUANTIZE = {Type.Q4_K: 144, Type.Q5_K: 176, Type.Q6_K: 210}
"""Block type → bytes in a block of 256 values: made of random bytes with a small scale instead."""


def random_blocks(rng: np.random.Generator, shape: tuple[int, ...], kind: Type) -> np.ndarray:
    """A random tensor in the block type, as bytes (or as floats for F32 and F16)."""
    values = rng.normal(0, 0.05, shape).astype(np.float32)
    if kind not in PYTHON_CANNOT_QUANTIZE:
        return gguf.quants.quantize(values, kind)
    size = PYTHON_CANNOT_QUANTIZE[kind]
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // 256, size), dtype=np.uint8)
    scale = rng.uniform(1e-4, 1e-3, (*blocks.shape[:-1], 2)).astype(np.float16).view(np.uint8)
    if kind is Type.Q6_K:
        blocks[..., -2:] = scale[..., :2]
    else:
        blocks[..., :4] = scale
    return blocks.reshape(*shape[:-1], -1)


class SmallGGUF:
    """Writes a two-layer model of one layout; remembers every tensor's values as the `gguf` package dequantises them."""

    def __init__(self, path: Path, layout: str, kind: Type = Type.F32, *, tied: bool = True, seed: int = 0) -> None:
        self.path = path
        self.layout = layout
        self.kind = kind
        self.rng = np.random.default_rng(seed)
        self.values: dict[str, np.ndarray] = {}
        self.writer = gguf.GGUFWriter(str(path), layout)
        self.metadata()
        self.tensors(tied=tied)

    def metadata(self) -> None:
        writer = self.writer
        writer.add_block_count(LAYERS)
        writer.add_context_length(1024)
        writer.add_embedding_length(HIDDEN)
        writer.add_feed_forward_length(FFN)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_key_length(HEAD_DIM)
        writer.add_value_length(HEAD_DIM)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(50000.0)
        writer.add_vocab_size(VOCAB)
        writer.add_eos_token_id(2)
        if self.layout == "qwen3moe":
            writer.add_expert_count(4)
            writer.add_expert_used_count(2)
            writer.add_expert_feed_forward_length(FFN)

    def tensors(self, *, tied: bool) -> None:
        self.add("token_embd.weight", (VOCAB, HIDDEN))
        for i in range(LAYERS):
            self.attention(f"blk.{i}")
            if self.layout == "qwen3moe":
                self.add(f"blk.{i}.ffn_gate_inp.weight", (4, HIDDEN), Type.F32)
                self.add(f"blk.{i}.ffn_gate_exps.weight", (4, FFN, HIDDEN))
                self.add(f"blk.{i}.ffn_up_exps.weight", (4, FFN, HIDDEN))
                self.add(f"blk.{i}.ffn_down_exps.weight", (4, HIDDEN, FFN))
            else:
                self.add(f"blk.{i}.ffn_gate.weight", (FFN, HIDDEN))
                self.add(f"blk.{i}.ffn_up.weight", (FFN, HIDDEN))
                self.add(f"blk.{i}.ffn_down.weight", (HIDDEN, FFN))
        self.add("output_norm.weight", (HIDDEN,), Type.F32)
        if not tied:
            self.add("output.weight", (VOCAB, HIDDEN))

    def attention(self, block: str) -> None:
        self.add(f"{block}.attn_norm.weight", (HIDDEN,), Type.F32)
        self.add(f"{block}.ffn_norm.weight", (HIDDEN,), Type.F32)
        for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            self.add(f"{block}.attn_{part}.weight", (heads * HEAD_DIM, HIDDEN))
            if self.layout == "qwen2":
                self.add(f"{block}.attn_{part}.bias", (heads * HEAD_DIM,), Type.F32)
        if self.layout.startswith("qwen3"):
            self.add(f"{block}.attn_q_norm.weight", (HEAD_DIM,), Type.F32)
            self.add(f"{block}.attn_k_norm.weight", (HEAD_DIM,), Type.F32)
        self.add(f"{block}.attn_output.weight", (HIDDEN, HEADS * HEAD_DIM))

    def add(self, name: str, shape: tuple[int, ...], kind: Type | None = None) -> None:
        kind = self.kind if kind is None else kind
        data = random_blocks(self.rng, shape, kind)
        self.values[name] = gguf.quants.dequantize(data, kind).reshape(shape)
        self.writer.add_tensor(name, data, raw_dtype=kind)

    def write(self) -> Path:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()
        return self.path


@pytest.fixture
def small_gguf(tmp_path: Path) -> Callable[..., SmallGGUF]:
    """`small_gguf(layout, kind, …)`: a file being written; `.write()` gives its path."""

    def make(layout: str, *args: Any, **options: Any) -> SmallGGUF:
        return SmallGGUF(tmp_path / f"{layout}.gguf", layout, *args, **options)

    return make
