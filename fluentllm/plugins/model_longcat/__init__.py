"""Plugin: LongCat-Flash, and LongCat-Flash-Lite with its n-gram embedding; the MTP layer of both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fluentllm.core.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fluentllm.core.protocols import BuildContext, Model, RegisterModel
    from fluentllm.core.types import ModelSpec

FLUENT_API_VERSION = 1


class LongcatFamily:
    def __init__(self, architecture: str) -> None:
        self.architecture = architecture

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        return self._read(config).spec()

    def build(self, config: Mapping[str, Any], context: BuildContext) -> Model:
        from .model import Longcat

        return Longcat(context, self._read(config))

    def _read(self, config: Mapping[str, Any]) -> Any:
        from fluentllm.layers.rotary import rope_parameters

        from .config import LongcatConfig

        rope_parameters(config)
        return LongcatConfig.read(config, self.architecture)


class LongcatPlugin:
    @hookimpl
    def fluent_models(self, register: RegisterModel) -> None:
        from .config import FLASH, FLASH_ALIAS, NGRAM

        for architecture in (FLASH, FLASH_ALIAS, NGRAM):
            register(architecture, LongcatFamily(architecture))


plugin = LongcatPlugin()
