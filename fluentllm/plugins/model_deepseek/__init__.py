"""Plugin: DeepSeek-V2, V2-Lite and V3, with the MTP layer of V3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fluentllm.core.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fluentllm.core.protocols import BuildContext, Model, RegisterModel
    from fluentllm.core.types import ModelSpec

FLUENT_API_VERSION = 1


class DeepseekFamily:
    def __init__(self, architecture: str) -> None:
        self.architecture = architecture

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        return self._read(config).spec()

    def build(self, config: Mapping[str, Any], context: BuildContext) -> Model:
        from .model import Deepseek

        return Deepseek(context, self._read(config))

    def _read(self, config: Mapping[str, Any]) -> Any:
        from fluentllm.layers.rotary import rope_parameters

        from .config import DeepseekConfig

        rope_parameters(config)
        return DeepseekConfig.read(config, self.architecture)


class DeepseekPlugin:
    @hookimpl
    def fluent_models(self, register: RegisterModel) -> None:
        from .config import V2, V3

        for architecture in (V2, V3):
            register(architecture, DeepseekFamily(architecture))


plugin = DeepseekPlugin()
