"""Real servers over a real transport: `fluent serve --role prefill` and `--role decode`, each a process tree of its own."""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
from processes.server import FLUENT, Server

KEY = "only for tests, 0123456789abcdef"
API_KEY = "the-router's"


def start(folder: Path, role: str, transport: str, *arguments: str, config: dict[str, object] | None = None) -> Server:
    folder.mkdir(parents=True, exist_ok=True)
    settings = [f"plugins.kv_layerwise.key={KEY}", f"disaggregation.transport={transport}", "engine.deterministic=true"]
    options = [word for setting in settings for word in ("--set", setting)]
    return Server(folder / "tiny", "--role", role, "--api-key", API_KEY, *options, *arguments, temporary=folder, config=config)


def door(server: Server) -> str:
    told = httpx.get(f"{server.url}/handoff", headers={"Authorization": f"Bearer {API_KEY}"}, timeout=10).json()
    return f"{told['host']}:{told['port']}"


class Router:
    """`fluent proxy` in front of them."""

    def __init__(self, prefill: list[Server], decode: list[Server], *arguments: str) -> None:
        engines = [word for server in prefill for word in ("--prefill", server.url)]
        engines += [word for server in decode for word in ("--decode", server.url)]
        command = [*FLUENT, "proxy", *engines, "--port", "0", "--api-key", API_KEY, *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            found = re.search(r"http://[\d.]+:\d+", line)
            if found:
                self.url = found[0]
                break
        threading.Thread(target=self.process.stdout.read, daemon=True).start()
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def complete(self, **body: object) -> dict:
        answer = self.client.post("/v1/completions", json={"max_tokens": 8, "temperature": 0, "ignore_eos": True, **body})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def close(self) -> None:
        self.client.close()
        self.process.terminate()
        self.process.wait(10)


@contextmanager
def cluster(
    folder: Path, transport: str, *arguments: str, config: dict[str, object] | None = None
) -> Iterator[tuple[Server, Server]]:
    """One of each. config: of another model than the tiny Llama."""
    with ExitStack() as stack:
        prefill = start(
            folder / "prefill", "prefill", transport, "--set", "plugins.kv_layerwise.port=0", *arguments, config=config
        )
        stack.callback(prefill.end)
        peers = f'plugins.kv_layerwise.peers=["{door(prefill)}"]'
        decode = start(folder / "decode", "decode", transport, "--set", peers, *arguments, config=config)
        stack.callback(decode.end)
        yield prefill, decode
