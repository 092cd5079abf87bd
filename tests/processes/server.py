"""A real server for tests: `fluent serve` in a process of its own, on a tiny random Llama."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil

TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
FLUENT = (sys.executable, "-c", "from fluentllm.cli import main; main()")
START_TIMEOUT = 60.0


def write_tiny_llama(folder: Path, config: dict[str, object] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or TINY_LLAMA))
    return folder


class Server:
    """Started, and waited for until it has printed its banner."""

    def __init__(self, folder: Path, *arguments: str, temporary: Path, config: dict[str, object] | None = None) -> None:
        """`temporary`: where the runtime folder shall be made. config: of another model."""
        model = write_tiny_llama(folder, config)
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("FLUENT_", "XDG_RUNTIME"))}
        fixed = ("--load-format", "dummy", "--port", "0", "--threads", "1", "--kv-memory", "64MiB")
        self.temporary = temporary
        self.process = subprocess.Popen(
            [*FLUENT, "serve", str(model), *fixed, *arguments],
            env={**environment, "FLUENT_PLUGINS": "", "TMPDIR": str(temporary)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._queue: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.wait_for("Ctrl-C")
        found = re.search(r"http://[^/\s]+", self.output)
        assert found, self.output
        self.url = found[0]
        self.client = httpx.Client(base_url=self.url, timeout=30)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._queue.put(line)
        self._queue.put(None)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_for(self, text: str) -> None:
        """Until a line has `text` in it."""
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            line = self._queue.get(timeout=max(0.1, deadline - time.monotonic()))
            assert line is not None, f"the server ended before it said {text!r}:\n{self.output}"
            self.lines.append(line)
            if text in line:
                return

    def wait_end(self, timeout: float = 30) -> int:
        """Until it has ended → exit code."""
        code = self.process.wait(timeout)
        while (line := self._queue.get(timeout=5)) is not None:
            self.lines.append(line)
        return code

    def child(self, module: str) -> psutil.Process:
        """The running `engine` or `frontend`."""
        for child in psutil.Process(self.process.pid).children():
            if f"fluentllm.processes.{module}" in child.cmdline():
                return child
        raise LookupError(module)

    def health(self) -> tuple[int, str]:
        response = httpx.get(f"{self.url}/health", timeout=10)
        return response.status_code, response.text

    def wait_healthy(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if self.health()[0] == 200:
                return
            time.sleep(0.05)
        raise TimeoutError(self.health())

    def complete(self, **options: object) -> httpx.Response:
        body = {"model": "tiny", "prompt": "abc", "max_tokens": 4, "temperature": 0, "ignore_eos": True, **options}
        return self.client.post("/v1/completions", json=body)

    def stream(self, **options: object):
        """A context manager; iterate over its `iter_lines()`."""
        body = {"model": "tiny", "prompt": "abc", "max_tokens": 5000, "ignore_eos": True, "stream": True, **options}
        return self.client.stream("POST", "/v1/completions", json=body)

    def runtime_folders(self) -> list[Path]:
        return list(self.temporary.glob("fluent-*"))

    def end(self) -> None:
        """Whatever state it is in, leave nothing behind."""
        children = psutil.Process(self.process.pid).children() if self.process.poll() is None else []
        self.process.kill()
        self.process.wait()
        for child in children:
            try:
                child.wait(10)
            except psutil.TimeoutExpired:
                child.send_signal(signal.SIGKILL)
        self.client.close()
        assert self.process.stdout is not None
        self.process.stdout.close()
