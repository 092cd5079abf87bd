"""What README and docs say can be typed, opened and set: commands, links, names of code, settings, example files."""

from __future__ import annotations

import ast
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import typer
import yaml

from fluentllm import cli
from fluentllm.core import config
from fluentllm.core.settings import Settings
from fluentllm.frontend.sampling import SamplingOptions
from fluentllm.jobs.job import load_job, parse_line

ROOT = Path(__file__).parents[2]
PAGES = [*(ROOT / name for name in ("README.md", "CHANGELOG.md", "examples/README.md")), *sorted((ROOT / "docs").glob("*.md"))]
UsageError: Any = typer.BadParameter.__base__
"""Of the click that Typer uses, which may be one of its own."""
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]

each_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


def blocks(page: Path, *languages: str) -> list[str]:
    """Fenced blocks of these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


# ----------------------------------------------------------------------------------------------------------------- commands
def commands(page: Path) -> Iterator[list[str]]:
    """Arguments of every `fluent …` that the page shows, in a block or in a line of text."""
    spans = re.findall(r"`([^`\n]+)`", prose(page))
    lines = [line for block in blocks(page, "", "sh", "console") for line in block.splitlines()]
    lines = [re.split(r" {3,}", line)[0] for line in lines]  # what follows is a remark
    for text in (*spans, *lines):
        for part in text.split("&&"):
            words = _words(part)
            while words and re.fullmatch(r"FLUENT_\w+=\S*", words[0]):
                words.pop(0)
            if words[:1] == ["fluent"] and "──" not in part:
                yield words[1:]


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text.replace("…", "").removeprefix("$ "), comments=True)
    except ValueError:
        return []


@pytest.fixture(scope="module")
def fluent() -> Any:
    with mock.patch.dict(os.environ, {"FLUENT_PLUGINS": ""}):
        return typer.main.get_command(cli.create_app())


def parse(command: Any, arguments: list[str]) -> None:
    """Raises `UsageError` for what the command would not take. Runs nothing."""
    context = command.make_context("fluent", [], resilient_parsing=True)
    while hasattr(command, "get_command") and arguments and arguments[0] not in ("--version", "--help"):
        name, *arguments = arguments
        command = command.get_command(context, name)
        if command is None:
            raise UsageError(f"no such command: {name}")
        context = command.make_context(name, [], parent=context, resilient_parsing=True)
    if not hasattr(command, "get_command"):
        command.make_context(context.info_name, list(arguments), parent=context.parent)


@each_page
def test_every_command_is_one(page: Path, fluent: Any) -> None:
    for arguments in commands(page):
        try:
            parse(fluent, arguments)
        except UsageError as error:
            message = error.format_message()
            # Text may name a command or an option without all that belongs to it.
            if not message.startswith("Missing ") and "requires an argument" not in message:
                pytest.fail(f"fluent {shlex.join(arguments)}: {message}")


def test_the_readme_shows_every_command() -> None:
    shown = {arguments[0] for arguments in commands(ROOT / "README.md") if arguments}
    assert set(cli.COMMANDS) <= shown


def test_commands_are_found_and_checked(tmp_path: Path, fluent: Any) -> None:
    """This test can fail."""
    page = tmp_path / "page.md"
    page.write_text("Type `fluent sevre` or\n\n```sh\nFLUENT_X__Y=1 fluent serve --prot 1   # no\n```\n")
    assert list(commands(page)) == [["sevre"], ["serve", "--prot", "1"]]
    for arguments in commands(page):
        with pytest.raises(UsageError):
            parse(fluent, arguments)


# -------------------------------------------------------------------------------------------------------------------- links
@each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"https?://|mailto:|#", target):
            assert (page.parent / target.split("#")[0]).exists(), target


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    assert [
        page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md" and f"({page.name})" not in index
    ] == []


@each_page
def test_every_name_is_in_the_file_that_it_links_to(page: Path) -> None:
    for label, target in re.findall(r"\[`([^`]+)`\]\(([^)\s]+\.py)\)", prose(page)):
        file = page.parent / target
        if label == file.name:
            continue
        parts = label.split(".")
        defined = _definitions(ast.parse(file.read_text(encoding="utf-8")))
        assert tuple(parts) in defined, f"{label} is not defined in {target}"


def _definitions(tree: ast.AST, prefix: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    found = set()
    for node in getattr(tree, "body", ()):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = (*prefix, node.name)
            found |= {name} | (_definitions(node, name) if isinstance(node, ast.ClassDef) else set())
    return found


@each_page
def test_every_path_in_the_text_exists(page: Path) -> None:
    """`core/kv/`, `tests/models`, `layers/mla.py`, in the repository or in the package."""
    top = (
        "assembly|bench|cli|core|dynamo|frontend|hub|jobs|kernels|layers|plugins|processes|step|testing|transfer|"
        "docs|tests|benchmarks|examples|fluentllm"
    )
    for path in re.findall(rf"`((?:{top})/[\w./-]*)`", prose(page)):
        assert (ROOT / path).exists() or (ROOT / "fluentllm" / path).exists(), path


# ----------------------------------------------------------------------------------------------------------------- settings
@each_page
def test_every_setting_exists(page: Path) -> None:
    """`server.port`, also as a variable, `FLUENT_SERVER__PORT`. (`model.mtp` and the like are names of code.)"""
    sections = {name for name in Settings.__struct_fields__ if name not in ("plugin", "plugins", "model")}
    tree = config.load(None, {}, {}).tree
    text = page.read_text(encoding="utf-8")
    found = re.findall(rf"`((?:{'|'.join(sections)})\.\w+)(?::[^`]*)?`", text)
    found += [name.lower().replace("__", ".") for name in re.findall(r"FLUENT_((?:[A-Z]+)__[A-Z_]+)", text)]
    for key in found:
        if not key.endswith(".py") and not key.startswith("plugins."):
            assert tree.find(key) is not None, key


@each_page
def test_every_example_file_loads(page: Path, tmp_path: Path) -> None:
    for number, text in enumerate(blocks(page, "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text)
        content = yaml.safe_load(text)
        if "input" in content:
            _, section = load_job(file)
            config.load(section, {}, {})
        elif page.name != "configuration.md":  # its example has a plugin that is not installed
            config.load(file, {}, {})


def test_every_example_line_of_a_job_is_one() -> None:
    page = ROOT / "docs/jobs.md"
    lines = [line for block in blocks(page, "json") for line in block.splitlines() if "index" not in line]
    assert len(lines) == 3
    for line in lines:
        parse_line(line.encode(), SamplingOptions())
