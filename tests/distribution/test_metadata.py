"""What the distribution tells pip: requirements, extras, commands, plugins."""

from __future__ import annotations

import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet


@pytest.fixture(scope="module")
def about(wheel: Path) -> Message:
    return message_from_bytes(_read(wheel, "METADATA"))


def _read(wheel: Path, name: str) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        [member] = [member for member in archive.namelist() if member.endswith(f".dist-info/{name}")]
        return archive.read(member)


def requirements(about: Message, extra: str, **marker: str) -> dict[str, Requirement]:
    """Of an extra alone, or without any, on a machine that the marker variables describe."""
    found = {}
    for line in about.get_all("Requires-Dist") or []:
        requirement = Requirement(line)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": extra, **marker})
        if applies and (extra in str(requirement.marker) if extra else "extra" not in str(requirement.marker)):
            found[requirement.name] = requirement
    return found


def test_python_and_torch(about: Message) -> None:
    python = SpecifierSet(str(about["Requires-Python"]))
    assert "3.11" in python
    assert "3.14" in python
    assert "3.10" not in python
    torch = requirements(about, "")["torch"].specifier
    assert "2.11" in torch
    assert "2.13.0" in torch
    assert "2.10" not in torch


def test_triton_is_for_linux_only(about: Message) -> None:
    linux = {"sys_platform": "linux", "platform_machine": "x86_64"}
    assert "triton" in requirements(about, "", **linux)
    for platform in ("darwin", "win32"):
        assert "triton" not in requirements(about, "", **{**linux, "sys_platform": platform})


@pytest.mark.parametrize(
    ("extra", "package"),
    [
        ("cuda", "flashinfer-python"),
        ("nixl", "nixl-cu13"),
        ("mooncake", "mooncake-transfer-engine-non-cuda"),
        ("grammar", "xgrammar"),
        ("test", "pytest"),
        ("dev", "ruff"),
        ("dev", "mypy"),
    ],
)
def test_the_extras(about: Message, extra: str, package: str) -> None:
    assert extra in (about.get_all("Provides-Extra") or [])
    assert package in requirements(about, extra)


def test_nixl_does_not_bring_both_cuda_builds(about: Message) -> None:
    assert "nixl" not in requirements(about, "nixl")


def test_nothing_heavy_is_required_at_run_time(about: Message) -> None:
    """Transformers, pytest and the like are for tests."""
    needed = requirements(about, "")
    assert not needed.keys() & {"transformers", "pytest", "openai", "fastapi", "flashinfer-python", "nixl-cu13"}


def test_the_command_and_the_plugins(wheel: Path) -> None:
    entry_points = _read(wheel, "entry_points.txt").decode()
    assert "fluent = fluentllm.cli:main" in entry_points
    assert "[fluentllm.plugins]" in entry_points


def test_the_version_is_the_packages(about: Message) -> None:
    from fluentllm import __version__

    assert about["Version"] == __version__
    assert about["License-Expression"] == "Apache-2.0"
