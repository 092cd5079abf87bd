"""Hugging Face ids: what is fetched, what is not, when the network is asked. A small hub on this machine answers."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNKNOWN = "no-such-branch"
INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
FILES = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors.index.json": INDEX.encode(),
    "model-00001-of-00002.safetensors": b"one" * 1000,
    "model-00002-of-00002.safetensors": b"two" * 1000,
    "consolidated.safetensors": b"the same again" * 1000,
    "original/consolidated.00.pth": b"and again" * 1000,
    "pytorch_model.bin": b"a pickle",
    "README.md": b"# Tiny",
    "tiny-Q4_1.gguf": b"GGUF" * 100,
}


class Hub(http.server.ThreadingHTTPServer):
    """The part of the hub's protocol that downloads use, for the one repository org/tiny."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files = dict(FILES)
        self.asked: list[str] = []


class HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append(path)
        if f"/{UNKNOWN}" in path:
            self.send_content(b"", {"X-Error-Code": "RevisionNotFound"}, body, status=404)
        elif path.startswith("/api/models/org/tiny/revision/"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self.send_content(json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode(), {}, body)
        elif path.startswith("/api/models/org/tiny/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.server.files.items()
            ]
            self.send_content(json.dumps(tree).encode(), {}, body)
        elif path.startswith("/org/tiny/resolve/") and (name := path.split("/", 5)[5]) in self.server.files:
            content = self.server.files[name]
            self.send_content(content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT}, body)
        elif path.startswith("/org/tiny/resolve/"):
            self.send_content(b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, body, status=404)
        else:
            code = "GatedRepo" if "gated" in path else "RepoNotFound"
            self.send_content(b"", {"X-Error-Code": code}, body, status=403 if "gated" in path else 404)

    def send_content(self, content: bytes, headers: dict[str, str], body: bool, status: int = 200) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content)), "Content-Type": "application/json"}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


CODE = """
import json, sys
from fluentllm.core.errors import ModelNotFound
from fluentllm.hub import resolve
name, options = sys.argv[1], json.loads(sys.argv[2])
try:
    files = resolve(name, progress=lambda *_: None, **options)
except ModelNotFound as error:
    print(json.dumps({"message": error.message, "fix": error.fix}))
else:
    inside = files.path.rglob("*") if files.kind == "folder" else ()
    found = sorted(str(path.relative_to(files.path)) for path in inside if path.is_file())
    print(json.dumps({"name": files.name, "path": str(files.path), "kind": files.kind, "files": found}))
"""


def resolved(endpoint: str, cache: Path, name: str, *, offline: bool = False, **options: Any) -> dict[str, Any]:
    """`resolve` in a process of its own: huggingface_hub reads its environment when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    for variable in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"):
        environment.pop(variable, None)
    if offline:
        environment["HF_HUB_OFFLINE"] = "1"
    command = [sys.executable, "-c", CODE, name, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def url(hub: Hub) -> str:
    return f"http://127.0.0.1:{hub.server_address[1]}"


def test_an_id_is_fetched_without_what_serving_does_not_need_and_then_never_asked_again(hub: Hub, tmp_path: Path) -> None:
    first = resolved(url(hub), tmp_path, "org/tiny")
    assert first["kind"] == "folder"
    assert first["files"] == [
        "chat_template.jinja",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    hub.asked.clear()
    assert resolved(url(hub), tmp_path, "org/tiny") == first
    assert not hub.asked
    resolved(url(hub), tmp_path, "org/tiny", refresh=True)
    assert hub.asked


def test_without_weights_only_the_small_files_come_and_the_rest_later(hub: Hub, tmp_path: Path) -> None:
    small = resolved(url(hub), tmp_path, "org/tiny", weights=False)
    assert not any(name.endswith(".safetensors") for name in small["files"])
    assert not any("safetensors" in path.rsplit("/")[-1] and not path.endswith(".json") for path in hub.asked)
    assert len(resolved(url(hub), tmp_path, "org/tiny")["files"]) == 6


def test_a_gguf_of_a_repository(hub: Hub, tmp_path: Path) -> None:
    files = resolved(url(hub), tmp_path, "org/tiny/tiny-Q4_1.gguf")
    assert files["kind"] == "gguf"
    assert files["path"].endswith("/tiny-Q4_1.gguf")
    hub.asked.clear()
    assert resolved(url(hub), tmp_path, "org/tiny/tiny-Q4_1.gguf") == files
    assert not hub.asked
    assert "has no file 'other.gguf'" in resolved(url(hub), tmp_path, "org/tiny/other.gguf")["message"]


def test_a_repository_of_ggufs_asks_for_one(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"tiny-Q4_1.gguf": b"GGUF", "README.md": b""}
    answer = resolved(url(hub), tmp_path, "org/tiny")
    assert "has no config.json" in answer["message"]
    assert "org/tiny/FILE.gguf" in answer["fix"]


def test_a_repository_whose_weights_are_incomplete(hub: Hub, tmp_path: Path) -> None:
    del hub.files["model-00002-of-00002.safetensors"]
    assert "no complete *.safetensors" in resolved(url(hub), tmp_path, "org/tiny")["message"]


def test_a_repository_with_pytorchs_own_files_alone(hub: Hub, tmp_path: Path) -> None:
    hub.files = {name: content for name, content in FILES.items() if "safetensors" not in name}
    first = resolved(url(hub), tmp_path, "org/tiny")
    assert first["files"] == ["chat_template.jinja", "config.json", "pytorch_model.bin", "tokenizer.json"]
    hub.asked.clear()
    assert resolved(url(hub), tmp_path, "org/tiny") == first
    assert not hub.asked


def test_unknown_and_gated_repositories(hub: Hub, tmp_path: Path) -> None:
    assert "There is no repository 'org/nothing'" in resolved(url(hub), tmp_path, "org/nothing")["message"]
    gated = resolved(url(hub), tmp_path, "org/gated")
    assert "'org/gated' is gated" in gated["message"]
    assert "hf auth login" in gated["fix"]


def test_a_revision_is_asked_for_by_its_name(hub: Hub, tmp_path: Path) -> None:
    files = resolved(url(hub), tmp_path, "org/tiny", revision="v2")
    assert len(files["files"]) == 6
    assert any("/v2" in path for path in hub.asked)
    assert not any("/main" in path for path in hub.asked)
    hub.asked.clear()
    assert resolved(url(hub), tmp_path, "org/tiny", revision="v2") == files
    assert not hub.asked
    for name in ("org/tiny", "org/tiny/tiny-Q4_1.gguf"):
        answer = resolved(url(hub), tmp_path, name, revision=UNKNOWN)
        assert f"has no revision '{UNKNOWN}'" in answer["message"]
        assert "branch, tag or commit" in answer["fix"]


def test_offline_what_is_here_is_used_and_nothing_is_asked(hub: Hub, tmp_path: Path) -> None:
    answer = resolved(url(hub), tmp_path, "org/tiny", offline=True)
    assert "'org/tiny' is not on this disk" in answer["message"]
    fetched = resolved(url(hub), tmp_path, "org/tiny")
    hub.asked.clear()
    assert resolved(url(hub), tmp_path, "org/tiny", offline=True) == fetched
    assert not hub.asked


def test_without_network(tmp_path: Path) -> None:
    answer = resolved("http://127.0.0.1:9", tmp_path, "org/tiny")
    assert "'org/tiny' is not on this disk, and the Hugging Face hub could not be read" in answer["message"]
    assert "HTTPS_PROXY" in answer["fix"]
    assert "give the folder" in answer["fix"]
