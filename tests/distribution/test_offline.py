"""`fluent serve longcat-nano` from the installed wheel, with an empty cache and no network: nothing is to be fetched."""

from __future__ import annotations

import os
import queue
import re
import subprocess
import threading
from collections.abc import Iterator

import openai
import pytest

from .conftest import Environment

NOWHERE = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
"""Whoever asks the network anyway is refused at once."""


@pytest.fixture
def url(fresh: Environment) -> Iterator[str]:
    command = [str(fresh.folder / "bin" / "fluent"), "serve", "longcat-nano", "--port", "0", "--device", "cpu"]
    cache = fresh.folder / "empty"
    environment = {"PATH": os.environ["PATH"], "HOME": str(cache), "FLUENT_CACHE": str(cache), **NOWHERE}
    process = subprocess.Popen(
        [*command, "--kv-memory", "256MiB"],
        cwd=fresh.folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: queue.Queue[str] = queue.Queue()
    assert process.stdout is not None
    threading.Thread(target=lambda out: [lines.put(line) for line in out], args=(process.stdout,), daemon=True).start()
    said = ""
    try:
        while "Ctrl-C" not in said:
            said += lines.get(timeout=120)
        found = re.search(r"http://\S+/v1\b", said)
        assert found, said
        yield found[0]
    finally:
        process.terminate()
        assert process.wait(60) == 0
    assert not list(cache.rglob("*.safetensors"))


def test_the_small_longcat_is_served(url: str) -> None:
    with openai.OpenAI(base_url=url, api_key="none", timeout=60, max_retries=0) as client:
        answer = client.completions.create(model="longcat-nano", prompt="import os\nimport", max_tokens=2, temperature=0)
        assert answer.choices[0].text == " os\n"
        chat = client.chat.completions.create(
            model="longcat-nano", messages=[{"role": "user", "content": "def main():"}], max_tokens=8, temperature=0
        )
        assert chat.choices[0].message.content
