"""Engines in processes of their own, for the measurements here: `fluent serve --role …` on a random model, KV over NIXL."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import httpx
import psutil

KEY = "only for benchmarks, 0123456789"
API_KEY = "router"
HEADERS = {"Authorization": f"Bearer {API_KEY}"}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
SMALL = {**LLAMA, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}


def bytes_per_token(model: dict[str, Any]) -> int:
    """layers × (k, v) × heads × width × float32."""
    return int(model["num_hidden_layers"] * 2 * model["num_key_value_heads"] * model["head_dim"] * 4)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Engine:
    """One `fluent serve`, waited for until it serves."""

    def __init__(
        self, folder: Path, role: str, *, model: dict[str, Any] = LLAMA, peers: list[str] | None = None, **settings: Any
    ) -> None:
        self.name = folder.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(model))
        self.control = f"127.0.0.1:{free_port()}"
        given = {
            "model.load_format": "dummy",
            "kv.memory": "512MiB",
            "engine.threads": 1,
            "server.port": 0,
            "server.api_key": API_KEY,
            "disaggregation.role": role,
            "plugins.kv_layerwise.key": KEY,
            "plugins.kv_layerwise.port": int(self.control.rpartition(":")[2]),
            "plugins.kv_layerwise.peers": peers or [],
            **settings,
        }
        words = [
            word
            for name, value in given.items()
            for word in ("--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}")
        ]
        self.log = (folder / "log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fluentllm.cli", "serve", str(folder), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "FLUENT_PLUGINS": "", "OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdout is not None
        said = ""
        for line in self.process.stdout:
            said += line
            self.log.write(line)
            self.log.flush()
            if "Ctrl-C" in line:
                break
        found = re.search(r"http://[^/\s]+", said)
        if found is None:
            raise RuntimeError(f"an engine did not start:\n{said}")
        self.url = found[0]
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log.write(line)
            self.log.flush()

    def processes(self) -> dict[str, psutil.Process]:
        """The supervisor, and its children that run now: `engine`, `frontend`."""
        supervisor = psutil.Process(self.process.pid)
        found = {"supervisor": supervisor}
        for child in supervisor.children():
            with contextlib.suppress(psutil.Error):
                modules = [word for word in child.cmdline() if word.startswith("fluentllm.processes.")]
                found.update({module.rpartition(".")[2]: child for module in modules})
        return found

    def engine_process(self) -> psutil.Process | None:
        return self.processes().get("engine")

    def state(self) -> dict[str, Any]:
        answer = httpx.get(f"{self.url}/handoff", headers=HEADERS, timeout=30)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Cluster:
    """Engines in one temporary folder; closes them all."""

    def __init__(self, keep: Path | None = None) -> None:
        """keep: a folder that is used instead, and stays, with the engines' logs."""
        self._folder = tempfile.TemporaryDirectory(prefix="fluent-bench-")
        self.path = keep or Path(self._folder.name)
        self.engines: list[Engine] = []

    def start(self, role: str, **settings: Any) -> Engine:
        engine = Engine(self.path / f"{role}-{len(self.engines)}", role, **settings)
        self.engines.append(engine)
        return engine

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        for engine in self.engines:
            engine.close()
        self._folder.cleanup()


def both(prefill: Engine, body: dict[str, Any]) -> dict[str, Any]:
    """The body with a room of its own."""
    host, _, port = prefill.control.rpartition(":")
    return {**body, "bootstrap_host": host, "bootstrap_port": int(port), "bootstrap_room": secrets.randbits(62)}


def machine() -> dict[str, Any]:
    """What a figure depends on."""
    return {"cores": os.cpu_count(), "load": os.getloadavg()[0], "python": sys.version.split()[0]}
