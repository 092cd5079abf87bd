"""Which of FlashInfer's modules a model needs, under which name FlashInfer keeps them, and how they are loaded.

FlashInfer compiles a module from its sources for one set of types and sizes, and keeps the library in its own cache folder
(`FLASHINFER_WORKSPACE_BASE`, by version and architecture). Here nothing is compiled: see `compiling.py`.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from fluentllm.core.protocols import AttentionSpec

MOST_ROWS = 8
"""Query rows a sequence in decode: a token and seven drafts."""


@dataclass(frozen=True, slots=True)
class Decode:
    """xqa: grouped heads, lengths and page tables on the device, `rows` query rows a sequence."""

    dtype: str
    page_size: int
    head_dim: int
    group: int
    """Query heads a KV head."""
    rows: int = 1

    def spec(self) -> Any:
        generate = importlib.import_module("flashinfer.jit.xqa").gen_xqa_module
        return generate(*self._arguments())

    def load(self) -> None:
        importlib.import_module("flashinfer.xqa").get_xqa_module(*self._arguments())

    def _arguments(self) -> tuple[Any, ...]:
        dtype = getattr(torch, self.dtype)
        return dtype, dtype, self.page_size, self.head_dim, self.group, False, dtype, self.rows


@dataclass(frozen=True, slots=True)
class Prefill:
    """FlashAttention 3 over ragged or paged KV, planned on the host."""

    dtype: str
    key_dim: int
    value_dim: int

    def spec(self) -> Any:
        generate = importlib.import_module("flashinfer.jit.attention.modules").gen_batch_prefill_module
        return generate("fa3", *self._arguments())

    def load(self) -> None:
        importlib.import_module("flashinfer.prefill").get_batch_prefill_module("fa3", *self._arguments())

    def _arguments(self) -> tuple[Any, ...]:
        """As the wrappers' `plan` asks for it: no positions encoded, no window, no cap of the logits, sums in float32."""
        dtype = getattr(torch, self.dtype)
        return dtype, dtype, dtype, torch.int32, self.key_dim, self.value_dim, 0, False, False, False


Module = Decode | Prefill
_KINDS: dict[str, Callable[..., Module]] = {"decode": Decode, "prefill": Prefill}


def to_json(module: Module) -> dict[str, Any]:
    return {"kind": type(module).__name__.lower(), **asdict(module)}


def from_json(data: dict[str, Any]) -> Module:
    fields = dict(data)
    return _KINDS[fields.pop("kind")](**fields)


def prefill_module(spec: AttentionSpec) -> Prefill:
    kv = spec.model.kv
    if kv.kind == "mla":
        return Prefill(spec.dtype, kv.nope_dim + kv.rope_dim, kv.value_dim)
    return Prefill(spec.dtype, kv.head_dim, kv.v_head_dim)


def decode_module(spec: AttentionSpec, rows: int) -> Decode:
    kv = spec.model.kv
    return Decode(spec.dtype, spec.page_size, kv.head_dim, spec.model.heads // kv.heads, rows)


def import_flashinfer(architecture: str) -> None:
    """For one architecture, such as `9.0a`, whatever GPUs there are: the cache folder is named by it. A library that lies in
    FlashInfer's cache folder is then loaded as it is: left to itself FlashInfer would look for the compiler first, and compile
    again what it thinks is out of date, while requests wait."""
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", architecture)
    environment: Any = importlib.import_module("flashinfer.jit.env")
    if not environment.has_flashinfer_jit_cache():
        environment.FLASHINFER_AOT_DIR = environment.FLASHINFER_JIT_DIR


def is_compiled(module: Module) -> bool:
    """And nobody is at it now: a library that is being linked is there before it is whole."""
    from filelock import FileLock, Timeout

    spec = module.spec()
    if not spec.is_compiled:
        return False
    try:
        with FileLock(spec.lock_path, timeout=0, thread_local=False):
            return bool(spec.is_compiled)
    except Timeout:
        return False
