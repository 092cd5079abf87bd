"""The wheel that a release would publish, and fresh environments with nothing but it and what it depends on."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOT_DEPENDENCIES = ("__pycache__", "__editable__", "fluentllm", "fluent_")
"""Beginnings of what stays behind when an environment lends its packages to a fresh one."""


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: building leaves files behind, and takes up those of builds before."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "fluentllm", source / "fluentllm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    if importlib.util.find_spec("pip") is not None:
        build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir"]
    else:
        build = ["uv", "build", "--wheel", "--no-build-isolation", "--offline", "--python", sys.executable, "--out-dir"]
    run(*build, str(folder / "dist"), str(source))
    [built] = (folder / "dist").glob("*.whl")
    return built


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment with the wheel in it. Its programs see no variable of ours but `PATH` and `HOME`."""

    folder: Path

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    def fluent(self, *arguments: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.run(str(self.folder / "bin" / "fluent"), *arguments, check=check, **variables)

    def run(self, *command: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        environment = {**kept, "FLUENT_CACHE": str(self.folder / "cache"), **variables}
        return run(*command, check=check, environment=environment, folder=self.folder)


@pytest.fixture(scope="session")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Made by Python's own venv, filled by pip."""
    pytest.importorskip("pip", reason="this environment has no pip")
    environment = Environment(tmp_path_factory.mktemp("fresh"))
    run(sys.executable, "-m", "venv", "--without-pip", str(environment.folder))
    lend_packages(environment)
    run(environment.python, "-m", "pip", "install", "--no-deps", "--no-index", str(wheel))
    return environment


@pytest.fixture(scope="session")
def fresh_uv(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Made and filled by uv: it has no pip."""
    if shutil.which("uv", path=program_path()) is None:
        pytest.skip("uv is not installed: pip install uv")
    environment = Environment(tmp_path_factory.mktemp("fresh-uv") / "venv")
    run("uv", "venv", "--offline", "--python", sys.executable, str(environment.folder))
    lend_packages(environment, "pip")
    run("uv", "pip", "install", "--offline", "--no-deps", "--python", environment.python, str(wheel))
    return environment


def lend_packages(environment: Environment, *without: str) -> None:
    """Link what this environment has installed into a fresh one, so that nothing is downloaded again."""
    theirs = environment.folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    left_out = (*NOT_DEPENDENCIES, *without)
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(folder).iterdir():
            link = theirs / entry.name
            if not entry.name.startswith(left_out) and not link.exists():
                link.symlink_to(entry)


def program_path() -> str:
    """`PATH`, with this environment's own programs first: it may not be activated."""
    return f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', '')}"


def run(
    *command: str, check: bool = True, environment: dict[str, str] | None = None, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    environment = environment if environment is not None else {**os.environ, "PATH": program_path()}
    program = shutil.which(command[0], path=environment["PATH"]) or command[0]
    result = subprocess.run(
        [program, *command[1:]], capture_output=True, text=True, env=environment, cwd=folder, check=False, timeout=300
    )
    assert not check or result.returncode == 0, f"{' '.join(command)}\n{result.stdout}\n{result.stderr}"
    return result
