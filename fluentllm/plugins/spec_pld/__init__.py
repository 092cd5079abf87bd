"""Prompt lookup decoding: drafts are what followed the last few tokens where they stood before. No draft model."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from ...core.hookspecs import hookimpl
from ...core.protocols import Proposer, ProposerContext, Register, RegisterConfig


class PldSettings(Struct, kw_only=True, forbid_unknown_fields=True):
    shortest: Annotated[int, Meta(ge=1, le=8, description="Least tokens that must stand elsewhere.")] = 2
    longest: Annotated[int, Meta(ge=1, le=8, description="Most tokens that are looked for.")] = 4

    def __post_init__(self) -> None:
        if self.shortest > self.longest:
            raise ValueError(f"shortest is {self.shortest}, above longest, which is {self.longest}: lower it or raise longest")


class SpecPld:
    @hookimpl
    def fluent_config(self, register: RegisterConfig) -> None:
        register(PldSettings)

    @hookimpl
    def fluent_proposers(self, register: Register) -> None:
        register("pld", _create)


def _create(context: ProposerContext) -> Proposer:
    from .proposer import PromptLookup

    settings = context.settings.plugin.get("spec_pld") or PldSettings()
    return PromptLookup(context.tables, settings.shortest, settings.longest)


plugin = SpecPld()
