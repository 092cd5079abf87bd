"""Who may import whom, as docs and design say; read from the source, and checked in fresh processes."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fluentllm"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
DEVICE_HALF = {f"fluentllm.core.{name}" for name in ("engine", "executor", "graphs", "slots", "staging", "kv.pool")}
TORCH = {"torch", "triton", "flashinfer", "transformers"}
HTTP = {"starlette", "uvicorn", "httpx", "httptools", "requests"}

MAY_IMPORT = {
    "core (torch-free half)": {"core (torch-free half)"},
    "core (device half)": {"core (torch-free half)", "core (device half)"},
    "kernels": {"kernels"},
    "layers": {"layers", "kernels", "core (torch-free half)"},
    "step": {"step", "kernels", "core (torch-free half)", "core (device half)"},
    "hub": {"hub", "core (torch-free half)"},
    "frontend": {"frontend", "hub", "core (torch-free half)"},
    "transfer": {"transfer", "core (torch-free half)"},
    "plugins": {"core (torch-free half)", "core (device half)", "step", "layers", "kernels", "frontend", "hub", "transfer"},
}
"""Room → rooms of ours that it may import, anywhere in its files. The other rooms (cli, processes, assembly …) put the house
together and may import all."""


def room(module: str) -> str:
    if module in DEVICE_HALF:
        return "core (device half)"
    parts = module.split(".")
    if len(parts) < 2:
        return "fluentllm"
    return "core (torch-free half)" if parts[1] == "core" else parts[1]


class Imports(ast.NodeVisitor):
    """Absolute names of what a module imports; those that are for the type checker alone do not count."""

    def __init__(self, module: str, path: Path) -> None:
        self.package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        self.everywhere: set[str] = set()
        self.at_import: set[str] = set()
        self._depth = 0
        self.visit(ast.parse(path.read_text(encoding="utf-8")))

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                self.visit(child)
        else:
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._depth += 1
        self.generic_visit(node)
        self._depth -= 1

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815  (the visitor's own naming)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        parents = self.package.split(".")
        base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
        source = ".".join(filter(None, [base, node.module]))
        for alias in node.names:
            name = f"{source}.{alias.name}"
            self._add(name if name in MODULES else source)

    def _add(self, name: str) -> None:
        self.everywhere.add(name)
        if not self._depth:
            self.at_import.add(name)


IMPORTS = {module: Imports(module, path) for module, path in MODULES.items()}


def tops(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("where", MAY_IMPORT)
def test_rooms_import_only_what_they_may(where):
    wrong = [
        f"{module} imports {name}"
        for module, imports in IMPORTS.items()
        if room(module) == where
        for name in sorted(imports.everywhere)
        if name.split(".")[0] == "fluentllm"
        and room(name) not in {*MAY_IMPORT[where], "fluentllm"}
        and not (where == "plugins" and name.split(".")[:3] == module.split(".")[:3])
    ]
    assert wrong == []


def test_plugins_do_not_import_each_other():
    wrong = [
        f"{module} imports {name}"
        for module, imports in IMPORTS.items()
        if module.startswith("fluentllm.plugins.")
        for name in imports.everywhere
        if name.startswith("fluentllm.plugins.") and name.split(".")[2] != module.split(".")[2]
    ]
    assert wrong == []


@pytest.mark.parametrize("where", ["core (torch-free half)", "hub", "frontend"])
def test_torch_free_rooms_never_import_torch(where):
    wrong = {module: found for module, i in IMPORTS.items() if room(module) == where and (found := tops(i.everywhere) & TORCH)}
    assert wrong == {}


def test_core_knows_no_http_and_layers_no_compiler():
    assert [m for m, i in IMPORTS.items() if m.startswith("fluentllm.core") and tops(i.everywhere) & HTTP] == []
    assert [m for m, i in IMPORTS.items() if room(m) == "layers" and "triton" in tops(i.everywhere)] == []


def test_nobody_imports_transformers():
    assert [module for module, imports in IMPORTS.items() if "transformers" in tops(imports.everywhere)] == []


def test_plugins_are_light_to_import():
    """What an entry point names is imported by front ends and command lines: no torch at its top."""
    entries = [m for m in MODULES if m.startswith("fluentllm.plugins.") and MODULES[m].name == "__init__.py"]
    assert [m for m in entries if m.count(".") == 2 and tops(IMPORTS[m].at_import) & (TORCH | HTTP)] == []


def test_the_modules_of_the_front_end_process_load_without_torch():
    modules = [m for m in MODULES if room(m) in ("frontend", "hub") or m.startswith("fluentllm.plugins.api_openai")]
    modules += ["fluentllm.processes.supervisor", "fluentllm.processes.frontend", "fluentllm.cli.serve"]
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        "from fluentllm.core.plugins import PluginManager\n"
        "assert PluginManager.load({'frontend'}).routes()\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'triton', 'transformers'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert result.stdout == "[]\n", result.stdout + result.stderr


def test_importing_fluentllm_is_quick():
    def once() -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import fluentllm"], check=True, timeout=60)
        return time.perf_counter() - started

    # The interpreter's own start is in it; the best of three, since other work may be running.
    assert min(once() for _ in range(3)) < 1.0


def test_no_file_is_longer_than_one_reads_at_a_sitting():
    lengths = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n") for path in MODULES.values()}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_every_module_says_what_it_is_for():
    silent = [
        module
        for module, path in MODULES.items()
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) and path.read_text(encoding="utf-8").strip()
    ]
    assert silent == []
