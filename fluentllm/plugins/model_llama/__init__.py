"""Llama-like models: Llama 2 and 3, Mistral, SmolLM. The network is `layers.decoder`; here their configs are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fluentllm.core.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fluentllm.core.protocols import BuildContext, Model, RegisterModel
    from fluentllm.core.types import ModelSpec
    from fluentllm.layers.decoder import DecoderConfig

FLUENT_API_VERSION = 1


class Llama:
    """`LlamaForCausalLM`, and `MistralForCausalLM` with its sliding window."""

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        return _read(config).spec

    def build(self, config: Mapping[str, Any], context: BuildContext) -> Model:
        from fluentllm.layers.decoder import Decoder

        return Decoder(context, _read(config))


def _read(config: Mapping[str, Any]) -> DecoderConfig:
    from fluentllm.layers.decoder_config import read_decoder_config

    bias = bool(config.get("attention_bias", False))
    return read_decoder_config(
        config,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        sliding_window=config.get("sliding_window"),
    )


class LlamaPlugin:
    @hookimpl
    def fluent_models(self, register: RegisterModel) -> None:
        family = Llama()
        for architecture in ("LlamaForCausalLM", "MistralForCausalLM"):
            register(architecture, family)


plugin = LlamaPlugin()
