"""Qwen2, Qwen3 and Qwen3-MoE: Llama-like, with biases on q, k, v (Qwen2), normed heads (Qwen3) and experts (MoE)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fluentllm.core.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fluentllm.core.protocols import BuildContext, Model, RegisterModel
    from fluentllm.core.types import ModelSpec

FLUENT_API_VERSION = 1


class Qwen:
    """A `ModelFamily` for one of `qwen2`, `qwen3`, `qwen3_moe`."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        from .config import read_config

        return read_config(self.kind, config).spec

    def build(self, config: Mapping[str, Any], context: BuildContext) -> Model:
        from .build import build

        return build(self.kind, config, context)


class QwenPlugin:
    @hookimpl
    def fluent_models(self, register: RegisterModel) -> None:
        register("Qwen2ForCausalLM", Qwen("qwen2"))
        register("Qwen3ForCausalLM", Qwen("qwen3"))
        register("Qwen3MoeForCausalLM", Qwen("qwen3_moe"))


plugin = QwenPlugin()
