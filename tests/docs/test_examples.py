"""The examples run: on a tiny random model, with a real server where they need one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes.server import Server, write_tiny_llama

from fluentllm.core import config
from fluentllm.jobs.job import load_job

EXAMPLES = Path(__file__).parents[2] / "examples"
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
DUMMY = {
    "FLUENT_PLUGINS": "",
    "FLUENT_ENGINE__THREADS": "1",
    "FLUENT_ENGINE__DEVICE": "cpu",
    "FLUENT_MODEL__LOAD_FORMAT": "dummy",
}


@pytest.fixture
def chatty(tmp_path: Path) -> dict[str, str]:
    """Environment for a tiny model with a chat template."""
    write_tiny_llama(tmp_path / "tiny")
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    return {**os.environ, **DUMMY, "FLUENT_MODEL__CHAT_TEMPLATE": str(tmp_path / "chat.jinja"), "FLUENT_KV__MEMORY": "64MiB"}


def run(*command: str, folder: Path, environment: dict[str, str]) -> str:
    result = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_every_example_is_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    files = [file.name for file in EXAMPLES.iterdir() if file.is_file() and file.name != "README.md"]
    assert len(files) >= 5
    assert [name for name in files if f"`{name}`" not in listed] == []


def test_offline(chatty: dict[str, str], tmp_path: Path) -> None:
    said = run(str(EXAMPLES / "offline.py"), "tiny", folder=tmp_path, environment=chatty)
    assert said.count("→") == 3


def test_stream(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    server = Server(tmp_path / "tiny", "--set", f"model.chat_template={tmp_path / 'chat.jinja'}", temporary=tmp_path)
    try:
        environment = {**os.environ, "OPENAI_BASE_URL": f"{server.url}/v1"}
        assert run(str(EXAMPLES / "stream.py"), "Who", "are", "you?", folder=tmp_path, environment=environment).strip()
    finally:
        server.client.close()
        server.process.terminate()
        server.wait_end()


def test_the_job(chatty: dict[str, str], tmp_path: Path) -> None:
    for name in ("job.yaml", "prompts.jsonl"):
        shutil.copy(EXAMPLES / name, tmp_path)
    load_job(tmp_path / "job.yaml")
    run("-m", "fluentllm.cli", "run", "job.yaml", folder=tmp_path, environment={**chatty, "FLUENT_MODEL__NAME": "tiny"})
    found = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(line["id"], len(line["choices"])) for line in found] == [("capital", 1), ("water", 1), ("two", 2)]


def test_the_settings() -> None:
    assert config.load(EXAMPLES / "serve.yaml", {}, {}).settings.log.requests
