"""What all tests share.

Third-party plugins stay out of tests, whatever is installed beside FluentLLM: `FLUENT_PLUGINS=` holds for this process and
those that it starts. Tests that want one name it (`allow=[...]`, or the variable of a subprocess).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

os.environ["FLUENT_PLUGINS"] = ""
if "PYTEST_XDIST_WORKER" in os.environ:  # workers, and the servers that they start, share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("fluentllm", deadline=None)  # other work on the machine must fail no test
settings.load_profile("fluentllm")


@pytest.hookimpl(trylast=True)  # some folders mark all of their tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`@pytest.mark.gpu` needs a GPU, `@pytest.mark.gpu(capability=(9, 0))` one of this compute capability."""
    for item in items:
        marker = item.get_closest_marker("gpu")
        missing = missing_gpu(marker.kwargs.get("capability")) if marker else None
        if missing:
            item.add_marker(pytest.mark.skip(reason=missing))


def missing_gpu(capability: tuple[int, int] | None) -> str | None:
    import torch

    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU that PyTorch can use"
    found = torch.cuda.get_device_capability()
    if capability and found != capability:
        return f"needs a GPU of compute capability {capability}, not {found}"
    return None


MakeDistribution = Callable[..., Path]


@pytest.fixture
def make_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeDistribution:
    """Installs a distribution for one test: `make_distribution("acme", {"fast": "acme_fast:plugin [engine]"}, acme_fast="…")`.

    What pip would have written is in a folder on `sys.path`; keyword arguments are modules by name.
    """

    def make(
        name: str, entries: Mapping[str, str], *, version: str = "1.2", direct_url: str | None = None, **modules: str
    ) -> Path:
        site = tmp_path / f"site-{name}"
        info = site / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = "".join(f"{entry} = {value}\n" for entry, value in entries.items())
        (info / "entry_points.txt").write_text(f"[fluentllm.plugins]\n{lines}")
        if direct_url is not None:
            (info / "direct_url.json").write_text(direct_url)
        for module, source in modules.items():
            (site / f"{module}.py").write_text(textwrap.dedent(source))
            monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.syspath_prepend(str(site))
        return site

    return make


@pytest.fixture(scope="module")
def third_party_plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`tests/third_party_plugin`, installed while a module's tests run → the plugin's name."""
    with _installed("third_party_plugin", "fluent_shortest_first", tmp_path_factory.mktemp("third_party")):
        yield "shortest_first"


@pytest.fixture(scope="module")
def third_party_proposer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`tests/third_party_proposer`, likewise."""
    with _installed("third_party_proposer", "fluent_bigram", tmp_path_factory.mktemp("third_party")):
        yield "bigram"


@contextlib.contextmanager
def _installed(distribution: str, package: str, folder: Path) -> Iterator[None]:
    """A distribution beside this file, installed by pip.

    It lies in a folder of its own on `sys.path` and `PYTHONPATH`. In this environment's `site-packages` the other workers of
    pytest-xdist would see it too, and see it half there while pip is at work.
    """
    source, site = folder / "source", folder / "site"
    shutil.copytree(Path(__file__).parent / distribution, source)  # building leaves files behind
    _pip_install("--quiet", "--no-build-isolation", "--no-deps", "--target", str(site), str(source))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        patch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
        yield
    for module in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[module]


@pytest.fixture
def quick_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    """`gguf.GGUFReader` takes a slice for each of 50,000 tokens; slices of numpy's memmap are slow: a plain array serves."""
    monkeypatch.setattr("numpy.memmap", lambda path, **_: np.fromfile(path, np.uint8))


def _pip_install(*arguments: str) -> None:
    if importlib.util.find_spec("pip") is not None:
        line = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *arguments]
    else:  # environments that uv made have no pip
        line = ["uv", "pip", "install", "--python", sys.executable, *arguments]
    result = subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
