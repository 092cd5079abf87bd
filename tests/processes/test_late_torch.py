"""A front end that does without torch until a request brings it in: the log says whose plugin, and where."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from .server import Server

if TYPE_CHECKING:
    from conftest import MakeDistribution

PLUGIN = """
from fluentllm.core.hookspecs import hookimpl

FLUENT_API_VERSION = 1

async def light(request):
    from importlib.util import find_spec
    from starlette.responses import JSONResponse

    return JSONResponse(find_spec("torch") is not None)

def total():
    import numbers_of_others  # line 13

    return numbers_of_others.total([1, 2, 3])

async def heavy(request):
    import asyncio

    from starlette.responses import JSONResponse

    return JSONResponse(await asyncio.to_thread(total))

class Plugin:
    @hookimpl
    def fluent_routes(self, register):
        register("/light", light)
        register("/heavy", heavy)

plugin = Plugin()
"""
NUMBERS = """
import torch

def total(numbers):
    return float(torch.tensor(numbers).sum())
"""


@pytest.fixture
def acme(make_distribution: MakeDistribution, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plugin that uses a library, on a thread."""
    site = make_distribution("acme", {"acme": "acme_routes:plugin [frontend]"}, acme_routes=PLUGIN)
    (site / "numbers_of_others.py").write_text(NUMBERS)
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=":")
    return site


def test_a_request_that_imports_torch_names_the_plugin(acme: Path, tmp_path: Path) -> None:
    server = Server(tmp_path / "tiny", "--set", "plugins.allow=acme", temporary=tmp_path)
    try:
        assert server.complete().status_code == 200
        assert server.client.get("/light").json() is True
        before = server.output
        for _ in range(2):
            assert server.client.get("/heavy").json() == 6.0
        server.wait_for("imports torch")
        server.process.terminate()
        assert server.wait_end() == 0
        said = [line for line in server.output.removeprefix(before).splitlines() if "torch" in line]
        assert len(said) == 1
        routes = f"{acme}/acme_routes.py"
        assert (
            f"plugin 'acme' (acme 1.2, {routes}) is a burden: it imports torch in the front end ({routes}, line 13)" in said[0]
        )
        assert "fluent_calls" in said[0]
    finally:
        server.end()


WATCHED = """
import importlib, importlib.util, logging, sys
logging.basicConfig(format="%(message)s", stream=sys.stdout)
from fluentllm.core.plugins import PluginManager
from fluentllm.core.plugins.burden import LateTorch

LateTorch(PluginManager.load({"frontend"}).infos).install()
assert importlib.util.find_spec("torch") is not None
print("found")
"""


@pytest.mark.parametrize(
    "how", ["import torch", "import torch.sub", "importlib.import_module('torch')", "from torch import sub"]
)
def test_what_no_plugin_imports_is_told_by_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """However it is imported, once, and it works; who asks only whether it is there has not imported it."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("")
    (tmp_path / "torch" / "sub.py").write_text("")
    script = tmp_path / "script.py"
    script.write_text(f"{WATCHED}\n{how}\nimport torch, torch.sub\nprint(torch.sub.__name__)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=60)
    found, said, worked = done.stdout.splitlines()
    assert (found, worked) == ("found", "torch.sub")
    assert said.startswith(f"Something imports torch in the front end ({script}, line 11)")
