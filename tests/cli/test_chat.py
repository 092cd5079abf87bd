"""`fluent chat`, as a user types into it: in this process and against a server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes.server import Server, write_tiny_llama

from .conftest import environment

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
TALKATIVE = ("--set", "plugins.weights_dummy.seed=8")
"""Random weights whose answers to the two questions below differ."""
Chat = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    write_tiny_llama(folder / "tiny")
    (folder / "chat.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    template = ("--set", f"model.chat_template={folder / 'chat.jinja'}", "--api-key", "secret", "--deterministic")
    server = Server(folder / "tiny", *template, *TALKATIVE, temporary=folder)
    yield server
    server.client.close()
    server.process.terminate()
    server.wait_end()


def talk(lines: list[str], *arguments: str, code: int = 0, **environ: str) -> subprocess.CompletedProcess[str]:
    """`lines` are what the user types; the end of them is Ctrl-D."""
    command = [sys.executable, "-m", "fluentllm.cli", "chat", "--temperature", "0", "--max-tokens", "6", *arguments]
    typed = "".join(f"{line}\n" for line in lines)
    result = subprocess.run(
        command, input=typed, env=environment(**environ), capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


def in_this_process(folder: Path) -> tuple[str, ...]:
    dummy = ("--set", "model.load_format=dummy", "--set", "engine.threads=1", "--set", "engine.deterministic=true")
    return (
        str(folder / "tiny"),
        "--device",
        "cpu",
        *dummy,
        *TALKATIVE,
        "--set",
        f"model.chat_template={folder / 'chat.jinja'}",
    )


def answers(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [answer.rstrip("\n") for answer in result.stdout.split("> ")[1:]]


def test_in_this_process_and_on_a_server_the_answers_are_the_same(folder: Path, server: Server) -> None:
    """The second answer depends on the first turn, the one after `/new` does not."""
    lines = ["hello", "and then?", "/new", "hello"]
    here = answers(talk(lines, *in_this_process(folder)))
    there = answers(talk(lines, "--url", server.url, "--api-key", "secret"))
    assert here == there
    first, second, new, again, end = here
    assert first == again != second
    assert (new, end) == ("", "")


def test_the_system_message_comes_first(folder: Path, server: Server) -> None:
    plain = answers(talk(["hello"], "--url", server.url, FLUENT_SERVER__API_KEY="secret"))
    pirate = answers(talk(["hello"], "--url", f"{server.url}/v1", "--system", "be a pirate", FLUENT_SERVER__API_KEY="secret"))
    assert plain != pirate


def test_an_empty_line_ends_it(server: Server) -> None:
    result = talk(["", "never read"], "--url", server.url, "--api-key", "secret")
    assert result.stdout == "> "


def test_an_error_is_told_and_the_chat_goes_on(server: Server) -> None:
    """A script learns of it by the exit code."""
    wrong_key = talk(["hello", "hello"], "--url", server.url, "--api-key", "wrong", code=2)
    assert wrong_key.stderr.count("The API key is missing or wrong") == 2
    wrong_model = talk(["hello"], "gpt-9", "--url", server.url, "--api-key", "secret", code=2)
    assert "gpt-9" in wrong_model.stderr
    nobody = talk(["hello"], "--url", "http://127.0.0.1:9", code=2)
    assert "http://127.0.0.1:9 does not answer" in nobody.stderr


def test_an_answer_after_an_error_is_an_answer(server: Server) -> None:
    long = "hello " * 9000
    result = talk([long, "hello"], "--url", server.url, "--api-key", "secret")
    assert "error: " in result.stderr
    assert len(answers(result)[1]) > 0


def test_sampling_out_of_bounds_is_refused(folder: Path) -> None:
    assert "temperature" in talk(["hello"], *in_this_process(folder), "--temperature", "7", code=2).stderr
