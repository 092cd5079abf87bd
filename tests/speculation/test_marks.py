"""Synthetic acceptance says so wherever its figures or answers come out: `ModelInfo.synthetic` is what they all say."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import typer
import yaml
from engine.harness import write_tiny_llama
from engine.test_every_model import LONGCAT
from processes.server import Server
from starlette.testclient import TestClient
from typer.testing import CliRunner

from fluentllm import LLM, SamplingOptions
from fluentllm.cli import create_app
from fluentllm.core.plugins import PluginManager
from fluentllm.core.types import KVSpec, ModelInfo, ModelSpec, SpeculativeInfo
from fluentllm.plugins.kv_layerwise import router
from fluentllm.processes.banner import banner

from . import mtp

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DRAFTS: dict[str, Any] = {"speculative.method": "pld", "speculative.k": 2, "plugins.spec_pld.shortest": 1}
SYNTHETIC = {**DRAFTS, "speculative.synthetic_acceptance": 2.0}
MARK = "SYNTHETIC: drafts are accepted at random, 2.0 tokens a step, so answers mean nothing"
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


MARKED = {
    "fluent serve": ["test_banner", "test_a_server"],
    "fluent run": ["test_results_of_a_job"],
    "fluent chat": ["test_a_chat"],
    "fluent bench latency": ["test_bench_latency"],
    "fluent bench throughput": ["test_bench"],
    "fluent bench serve": ["test_bench_of_a_server"],
    "fluent bench step": ["test_bench_step"],
    "fluent proxy": ["test_answers_through_the_proxy"],
    "fluent dynamo": [
        "disaggregation.test_dynamo_requests.test_drafts_that_were_accepted_at_random_are_told_in_every_chunk",
        "disaggregation.test_dynamo.test_drafts_that_were_accepted_at_random",
    ],
    "POST /v1/chat/completions": ["test_answers_of_the_api"],
    "POST /v1/completions": ["test_answers_of_the_api"],
    "GET /metrics": ["test_metrics"],
    "LLM.generate": ["test_completions_of_an_llm"],
    "LLM.chat": ["test_completions_of_an_llm"],
}
"""Whatever has answers of a model in it, or figures of one that runs → the tests that see the mark in it."""
WITHOUT = {
    *("fluent doctor", "fluent models list", "fluent models pull", "fluent models show"),
    *("fluent plugins list", "fluent plugins show", "fluent plugins trace", "fluent plugins doctor"),
    *("fluent config show", "fluent config schema", "fluent config explain"),
    *("GET /v1/models", "GET /v1/models/{model:path}", "GET /health", "GET /live", "GET /version", "GET /openapi.json"),
    *("GET /startup", "GET /plugins", "GET /handoff", "POST /tokenize", "POST /detokenize", "LLM.close"),
}
"""What is the same whether drafts are accepted at random or not."""


def outputs() -> set[str]:
    """Every command, every route, every method of `LLM`."""

    def commands(group: Any, name: str) -> set[str]:
        below = getattr(group, "commands", None)
        return {name} if below is None else set().union(*(commands(one, f"{name} {part}") for part, one in below.items()))

    routes = PluginManager.load({"frontend"}).routes()
    found = commands(typer.main.get_command(create_app()), "fluent")
    found |= {f"{method} {route.path}" for route in routes for method in route.methods}
    return found | {f"LLM.{name}" for name in vars(LLM) if not name.startswith("_")}


def test_no_output_is_forgotten() -> None:
    """A new command, route or method is either marked, which a test sees, or has nothing to mark."""
    assert not MARKED.keys() & WITHOUT
    assert outputs() == MARKED.keys() | WITHOUT
    for names in MARKED.values():
        for name in names:
            module, _, test = name.rpartition(".")
            assert callable(getattr(importlib.import_module(module or __name__), test))


def info(speculative: SpeculativeInfo | None) -> ModelInfo:
    kv = KVSpec(kind="gqa", layers=1, heads=1, head_dim=8, v_head_dim=8)
    spec = ModelSpec(architecture="A", vocab_size=9, hidden_size=8, layers=1, heads=1, max_position=64, kv=kv)
    return ModelInfo(
        name="m",
        spec=spec,
        max_model_len=64,
        device="cpu",
        dtype="float32",
        memory={"weights": 1},
        kv_tokens=64,
        page_size=16,
        slots=1,
        speculative=speculative,
    )


def test_banner() -> None:
    def text(speculative: SpeculativeInfo | None) -> str:
        return banner("http://h:1", info(speculative), example=None, needs_key=False, seconds=1.0)

    assert "drafts" not in text(None)
    assert "mtp, 0 to 4 a step" in text(SpeculativeInfo(method="mtp", k="auto", max_k=4))
    assert "SYNTHETIC" not in text(SpeculativeInfo(method="mtp", k=3, max_k=3))
    assert "curl" not in text(None)
    assert "mtp, 3 a step; SYNTHETIC" in text(SpeculativeInfo(method="mtp", k=3, max_k=3, synthetic_acceptance=2.5))


def flags(settings: dict[str, Any]) -> list[str]:
    return [f"--set={key}={value}" for key, value in settings.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("marks")
    (folder / "chat.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    template = f"--set=model.chat_template={folder / 'chat.jinja'}"
    server = Server(folder / "served", template, *flags(SYNTHETIC), temporary=folder)
    yield server
    server.client.close()
    server.process.terminate()
    server.wait_end()


@pytest.fixture(scope="module")
def url(server: Server) -> str:
    return server.url


def test_a_server(server: Server) -> None:
    """Its log and its start-up text."""
    assert [MARK in line for line in server.lines].count(True) >= 2


def test_metrics(url: str) -> None:
    assert "\nfluent_spec_decode_synthetic 1.0\n" in httpx.get(f"{url}/metrics", timeout=60).text


ASKED: dict[str, dict[str, Any]] = {
    "chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "completions": {"prompt": "hi", "echo": True},
}


@pytest.mark.parametrize("usage", [{}, {"stream_options": {"include_usage": True}}])
@pytest.mark.parametrize("path", ASKED)
def test_answers_of_the_api(url: str, path: str, usage: dict[str, Any]) -> None:
    """Whole ones, and each chunk of a stream, with usage or without."""
    with httpx.Client(base_url=url, timeout=60) as client:
        check_answers(client, path, usage)


@pytest.mark.parametrize("path", ASKED)
def test_answers_through_the_proxy(url: str, path: str) -> None:
    """Of a decode engine, where no prefill engine is up."""
    app = router.create_app(["http://127.0.0.1:9"], [url], api_key=None, pull=False)
    with TestClient(app) as client:
        check_answers(client, path, {})


def check_answers(client: httpx.Client, path: str, usage: dict[str, Any]) -> None:
    body = {"model": "served", "max_tokens": 6, "n": 2, "ignore_eos": True, **ASKED[path]}
    assert client.post(f"/v1/{path}", json=body).json()["synthetic"] == MARK
    text = client.post(f"/v1/{path}", json={**body, "stream": True, **usage}).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert len(events) > 4
    assert {event["synthetic"] for event in events} == {MARK}
    assert (events[-1].get("usage") is not None) == bool(usage)


def test_bench_of_a_server(url: str, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    sizes = ["--requests=2", "--rate=0", "--input-len=8", "--output-len=4"]
    result = CliRunner().invoke(create_app(), ["bench", "serve", "--url", url, *sizes, "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert MARK in result.output.splitlines()
    figures = json.loads(file.read_text())
    assert figures["synthetic"] == figures["serve"]["synthetic"] == MARK


def test_a_chat(url: str, folder: Path) -> None:
    """With a server and in this process: before each answer, and no part of the conversation."""
    here = [str(folder / "served"), "--device=cpu", "--set=model.load_format=dummy", "--set=engine.threads=1"]
    for where in (["--url", url], [*here, f"--set=model.chat_template={folder / 'chat.jinja'}", *flags(SYNTHETIC)]):
        command = [sys.executable, "-m", "fluentllm.cli", "chat", "--max-tokens=4", *where]
        done = subprocess.run(command, input="hello\nagain\n", capture_output=True, text=True, timeout=120, check=True)
        first, second, _ = done.stdout.split("> ")[1:]
        assert first.startswith(f"{MARK}\n")
        assert second.startswith(f"{MARK}\n")


@pytest.mark.parametrize(("drafts", "mark"), [(SYNTHETIC, MARK), (DRAFTS, None)])
def test_completions_of_an_llm(folder: Path, drafts: dict[str, Any], mark: str | None) -> None:
    model = str(write_tiny_llama(folder / "offline", vocab_size=300))
    settings = {"model.load_format": "dummy", "engine.device": "cpu", "engine.threads": 1, **drafts}
    options = SamplingOptions(max_tokens=4, n=2, ignore_eos=True)
    with LLM(model, settings={**settings, "model.chat_template": str(folder / "chat.jinja")}) as llm:
        found = [*llm.generate(["abcabc", "b"], options), *llm.chat([{"role": "user", "content": "ab"}], options)]
    assert [completion.synthetic for completion in found] == [mark] * 6


@pytest.mark.parametrize(("drafts", "mark"), [(SYNTHETIC, MARK), (DRAFTS, None)])
def test_results_of_a_job(tmp_path: Path, drafts: dict[str, Any], mark: str | None) -> None:
    """Each line; and what was accepted at random is not gone on with in earnest."""
    (tmp_path / "in.jsonl").write_text('{"prompt": "abcabc"}\n{"prompt": [3, 4]}\n')
    model = {"name": str(write_tiny_llama(tmp_path / "model", vocab_size=300)), "load_format": "dummy"}
    settings = {"model": model, "engine": {"threads": 1, "device": "cpu"}}
    job = {"input": "in.jsonl", "output": "out.jsonl", "sampling": {"max_tokens": 4}, "settings": settings}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    command = [sys.executable, "-m", "fluentllm.cli", "run", str(tmp_path / "job.yaml")]
    done = subprocess.run([*command, *flags(drafts)], capture_output=True, text=True, timeout=120, check=True)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line.get("synthetic") for line in lines] == [mark] * 2
    assert (MARK in done.stderr) == (mark is not None)
    again = subprocess.run([*command, *flags(DRAFTS)], capture_output=True, text=True, timeout=120, check=False)
    assert (again.returncode == 0) == (mark is None)
    assert ("results of another job" in again.stderr) == (mark is not None)


def test_bench_step(folder: Path, tmp_path: Path) -> None:
    model, file = write_tiny_llama(folder / "step"), tmp_path / "figures.json"
    arguments = ["bench", "step", str(model), "--batch=2", "--ctx=9", "--steps=2", "--json", str(file)]
    options = ["--load-format=dummy", "--device=cpu", "--set=engine.threads=1", *flags(SYNTHETIC)]
    result = CliRunner().invoke(create_app(), [*arguments, *options])
    assert result.exit_code == 0, result.output
    assert MARK in result.output.splitlines()
    assert json.loads(file.read_text())["synthetic"] == MARK


def test_bench(tmp_path: Path) -> None:
    """MTP on random weights, as speed is measured."""
    model, file = write_tiny_llama(tmp_path / "longcat", base=LONGCAT), tmp_path / "figures.json"
    sets = ("speculative.method=mtp", "speculative.k=3", "speculative.synthetic_acceptance=3.0", "engine.threads=1")
    arguments = ["bench", "throughput", str(model), "--requests", "8", "--input-len", "9", "--output-len", "90"]
    options = ["--load-format", "dummy", "--device", "cpu", "--json", str(file), *(f"--set={s}" for s in sets)]
    result = CliRunner().invoke(create_app(), [*arguments, *options])
    assert result.exit_code == 0, result.output
    assert "SYNTHETIC" in result.output
    assert json.loads(file.read_text())["synthetic"].startswith("SYNTHETIC")
    figures = json.loads(file.read_text())["speculative"]
    assert (figures["method"], figures["k"]) == ("mtp", 3)
    assert figures["synthetic"] is True
    assert figures["synthetic_acceptance"] == 3.0
    assert 2.6 < figures["mean_accepted_length"] < 3.4
    assert figures["accepted"] < figures["drafted"] == 3 * figures["verifications"]


@pytest.mark.parametrize("k", ["3", "auto"])
def test_bench_latency(tmp_path: Path, k: str) -> None:
    """The time of a token, on a small DeepSeek-V3 with an MTP layer."""
    model, file = write_tiny_llama(tmp_path / "deepseek", base=mtp.CONFIGS["deepseek_v3"]), tmp_path / "figures.json"
    arguments = ["bench", "latency", str(model), "--batch", "1,5", "--ctx", "24", "--steps", "60", "--json", str(file)]
    options = ["--load-format=dummy", "--device=cpu", "--speculative=mtp", f"--k={k}", "--synthetic-acceptance=3.0"]
    sets = ["--set=speculative.max_k=3", "--set=engine.threads=1"]
    result = CliRunner().invoke(create_app(), [*arguments, *options, *sets])
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if "mean accepted length" in line]
    assert len(lines) == 3
    assert all(f"mtp, k {k}: " in line and "SYNTHETIC" in line for line in lines)
    figures = json.loads(file.read_text())
    for row in [*(row["speculative"] for row in figures["decode"]), figures["speculative"]]:
        assert (row["method"], row["synthetic"], row["synthetic_acceptance"]) == ("mtp", True, 3.0)
        if k == "3":
            assert 2.3 < row["mean_accepted_length"] < 3.7
            assert row["drafts_a_step"] > 2.5
        else:
            assert 0 <= row["drafts_a_step"] <= 3
