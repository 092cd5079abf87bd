"""Synthetic acceptance says so wherever its figures or answers come out: `ModelInfo.synthetic` is what they all say."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml
from engine.harness import write_tiny_llama
from engine.test_every_model import LONGCAT
from processes.server import Server
from typer.testing import CliRunner

from fluentllm import LLM, SamplingOptions
from fluentllm.cli import create_app
from fluentllm.core.types import KVSpec, ModelInfo, ModelSpec, SpeculativeInfo
from fluentllm.processes.banner import banner

from . import mtp

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DRAFTS: dict[str, Any] = {"speculative.method": "pld", "speculative.k": 2, "plugins.spec_pld.shortest": 1}
SYNTHETIC = {**DRAFTS, "speculative.synthetic_acceptance": 2.0}
MARK = "SYNTHETIC: drafts are accepted at random, 2.0 tokens a step, so answers mean nothing"
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


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
def url(folder: Path) -> Iterator[str]:
    template = f"--set=model.chat_template={folder / 'chat.jinja'}"
    server = Server(folder / "served", template, *flags(SYNTHETIC), temporary=folder)
    assert MARK in server.output
    yield server.url
    server.client.close()
    server.process.terminate()
    server.wait_end()


@pytest.mark.parametrize("usage", [{}, {"stream_options": {"include_usage": True}}])
@pytest.mark.parametrize(
    ("path", "asked"),
    [("chat/completions", {"messages": [{"role": "user", "content": "hi"}]}), ("completions", {"prompt": "hi", "echo": True})],
)
def test_answers_of_the_api(url: str, path: str, asked: dict[str, Any], usage: dict[str, Any]) -> None:
    """Whole ones, and each chunk of a stream, with usage or without."""
    body = {"model": "served", "max_tokens": 6, "n": 2, "ignore_eos": True, **asked}
    assert httpx.post(f"{url}/v1/{path}", json=body, timeout=60).json()["synthetic"] == MARK
    text = httpx.post(f"{url}/v1/{path}", json={**body, "stream": True, **usage}, timeout=60).text
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
    with LLM(model, settings=settings) as llm:
        found = llm.generate(["abcabc", "b"], SamplingOptions(max_tokens=4, n=2, ignore_eos=True))
    assert [completion.synthetic for completion in found] == [mark] * 4


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
