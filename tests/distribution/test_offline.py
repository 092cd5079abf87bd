"""`fluent serve` of what comes with the package, from the installed wheel, without a network: nothing is to be fetched."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import openai
import pytest

from fluentllm.core.errors import FluentError
from fluentllm.hub import resolve

from .conftest import Environment

NOWHERE = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
"""Whoever asks the network anyway is refused at once."""


@contextlib.contextmanager
def serving(fresh: Environment, cache: Path, *arguments: str) -> Iterator[openai.OpenAI]:
    command = [str(fresh.folder / "bin" / "fluent"), "serve", *arguments, "--port", "0", "--device", "cpu"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(cache), "FLUENT_CACHE": str(cache), **NOWHERE}
    process = subprocess.Popen(
        [*command, "--kv-memory", "512MiB"],
        cwd=fresh.folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: queue.Queue[str] = queue.Queue()
    assert process.stdout is not None
    # Empty at the end, which must not be waited for if it comes too soon.
    output = chain(process.stdout, [""])
    threading.Thread(target=lambda: [lines.put(line) for line in output], daemon=True).start()
    said = ""
    try:
        while "Ctrl-C" not in said:
            line = lines.get(timeout=120)
            assert line, said
            said += line
        found = re.search(r"http://\S+/v1\b", said)
        assert found, said
        with openai.OpenAI(base_url=found[0], api_key="none", timeout=60, max_retries=0) as client:
            yield client
    finally:
        process.terminate()
        assert process.wait(60) == 0
    assert not list(cache.rglob("*.safetensors"))


def test_the_small_longcat_is_served(fresh: Environment, tmp_path: Path) -> None:
    """With an empty cache."""
    with serving(fresh, tmp_path, "longcat-nano") as client:
        answer = client.completions.create(model="longcat-nano", prompt="import os\nimport", max_tokens=2, temperature=0)
        assert answer.choices[0].text == " os\n"
        chat = client.chat.completions.create(
            model="longcat-nano", messages=[{"role": "user", "content": "def main():"}], max_tokens=8, temperature=0
        )
        assert chat.choices[0].message.content


def test_the_small_longcat_is_served_with_its_drafts(fresh: Environment, tmp_path: Path) -> None:
    with serving(fresh, tmp_path, "longcat-nano", "--speculative", "mtp", "--set", "speculative.k=3") as client:
        answer = client.completions.create(model="longcat-nano", prompt="import os\nimport", max_tokens=40, temperature=0)
        assert answer.choices[0].text.startswith(" os\n")
        check_drafts(answer, "mtp")


def test_the_default_model_is_served_with_the_head_in_the_package(fresh: Environment, tmp_path: Path) -> None:
    """By its short name. The model itself is no part of the wheel: its file was put into the cache."""
    try:
        file = resolve("smollm2").path
    except FluentError as error:
        pytest.skip(f"the default model is not to be had: {error}")
    there = tmp_path / "models" / "smollm2" / file.name
    there.parent.mkdir(parents=True)
    shutil.copy(file, there)
    with serving(fresh, tmp_path, "smollm2", "--speculative", "eagle", "--set", "speculative.k=3") as client:
        asked = "What is the capital of France?"
        answer = client.chat.completions.create(
            model="smollm2", messages=[{"role": "user", "content": asked}], max_tokens=24, temperature=0
        )
        assert "Paris" in (answer.choices[0].message.content or "")
        check_drafts(answer, "eagle")


def check_drafts(answer: openai.types.Completion | openai.types.chat.ChatCompletion, proposer: str) -> None:
    """Some were accepted, and some were wrong."""
    assert answer.usage is not None
    details = answer.usage.completion_tokens_details
    assert details is not None
    assert details.model_extra is not None
    assert details.model_extra["proposer"] == proposer
    assert details.accepted_prediction_tokens
    assert details.rejected_prediction_tokens
