"""Dynamo's own front end and workers of ours, each a process; discovery by files, everything on the loopback address."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from processes.server import FLUENT, START_TIMEOUT, TINY_LLAMA
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from .servers import KEY

SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>"]
TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"


def free_port() -> int:
    """Below 32,768: Dynamo 1.6.1 keeps DYN_SYSTEM_PORT in 16 bits with a sign."""
    while True:
        port = random.randrange(20_000, 32_768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def write_model(folder: Path) -> Path:
    """A tiny Llama with a tokenizer of bytes: Dynamo's front end reads it, and there are no weights."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(vocab_size=260, special_tokens=SPECIAL, initial_alphabet=letters))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    added = {str(i): {"content": text, **plain} for i, text in enumerate(SPECIAL)}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": added}))
    (folder / "config.json").write_text(json.dumps({**TINY_LLAMA, "vocab_size": tokenizer.get_vocab_size()}))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    return folder


class Dynamo:
    """The front end; `worker` starts workers behind it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, write_model(folder / "tiny")
        local = ("DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST", "DYN_EVENT_PLANE_HOST", "DYN_SYSTEM_HOST")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("FLUENT_", "DYN_"))}
        self._environment = {
            **kept,
            **dict.fromkeys(local, "127.0.0.1"),
            "DYN_DISCOVERY_BACKEND": "file",
            "DYN_FILE_KV": str(folder / "discovery"),
            "DYN_REQUEST_PLANE": "tcp",
            "DYN_EVENT_PLANE": "zmq",
            "DYN_SDK_DISABLE_ANSI_LOGGING": "1",
            "DYN_SELF_HOST_METADATA": "0",
            "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "1",
            "DYN_PREFILL_DRAIN_TIMEOUT_S": "2",
            "HF_HUB_OFFLINE": "1",
            "FLUENT_PLUGINS": "",
            "TMPDIR": str(folder),
        }
        self._processes: list[subprocess.Popen[bytes]] = []
        port = free_port()
        command = [sys.executable, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port)]
        self._start("front end", [*command, "--router-mode", "round-robin"])
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def worker(self, name: str, role: str, *arguments: str) -> str:
        """A worker that serves the model as `name` → the URL of its metrics. It may not be up yet."""
        fixed = ("--load-format", "dummy", "--threads", "1", "--kv-memory", "64MiB", "--deterministic", "--served-name", name)
        port = free_port()
        command = [*FLUENT, "dynamo", str(self.model), "--namespace", name, "--role", role, *fixed, *arguments]
        self._start(f"{name}-{role}", command, DYN_SYSTEM_PORT=str(port), FLUENT_PLUGINS__KV_LAYERWISE__KEY=KEY)
        return f"http://127.0.0.1:{port}/metrics"

    def _start(self, name: str, command: list[str], **environment: str) -> None:
        with (self.folder / f"{name}.log").open("w") as log:
            self._processes.append(
                subprocess.Popen(command, env={**self._environment, **environment}, stdout=log, stderr=subprocess.STDOUT)
            )

    def wait_for(self, *names: str) -> None:
        """Until all of these models are served."""
        deadline = time.monotonic() + 3 * START_TIMEOUT  # six processes start at once
        served: set[str] = set()
        while not served >= set(names):
            ended = [process.args for process in self._processes if process.poll() is not None]
            logs = "\n".join(f"{path}: …{path.read_text()[-3000:]}" for path in self.folder.glob("*.log"))
            assert not ended, f"{ended} ended:\n{logs}"
            assert time.monotonic() < deadline, f"{served} are served:\n{logs}"
            time.sleep(0.1)
            try:
                served = {model["id"] for model in self.client.get("/v1/models").json()["data"]}
            except httpx.HTTPError:
                continue

    def end(self) -> None:
        self.client.close()
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def dynamo(folder: Path) -> Iterator[Dynamo]:
    made = Dynamo(folder)
    try:
        yield made
    finally:
        made.end()
