"""`fluent bench`: the figures that its JSON holds, and what it refuses to measure."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine.harness import write_tiny_llama
from processes.server import Server
from speculation.eagle import write_draft

from fluentllm.bench import offline
from fluentllm.bench.beside import About, Ask, Beside, pair
from fluentllm.bench.online import Load, Sample, summary
from fluentllm.bench.report import percentiles
from fluentllm.core import config
from fluentllm.core.errors import FluentError
from fluentllm.local import LocalEngine

from .conftest import Fluent

DUMMY = ("--load-format", "dummy", "--device", "cpu", "--set", "engine.threads=1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_llama(tmp_path_factory.mktemp("bench") / "tiny"))


def check_environment(figures: dict[str, Any], command: str) -> None:
    """What every benchmark says of itself."""
    assert figures["command"].startswith(f"fluent bench {command}")
    assert {"python", "fluentllm", "torch"} <= figures["versions"].keys()
    assert figures["device"]["cores"] >= 1
    assert figures["device"]["cpu"]
    assert figures["date"].endswith("Z")


def test_latency(fluent_process: Fluent, model: str, tmp_path: Path) -> None:
    file = tmp_path / "latency.json"
    arguments = ("--batch", "1,3", "--ctx", "24", "--steps", "16", "--rounds", "2", "--json", str(file))
    printed = fluent_process("bench", "latency", model, *arguments, *DUMMY).stdout
    figures = json.loads(file.read_text())
    check_environment(figures, f"latency {model} --batch 1,3")
    assert figures["model"] == model
    assert figures["speculative"] is None
    assert 0.1 < figures["startup_s"] < 60
    stages = figures["startup"]
    assert {"process", "imports", "weights", "pool", "first token"} <= {stage["name"] for stage in stages}
    assert (stages[0]["name"], stages[0]["start"], stages[-1]["name"]) == ("process", 0, "first token")
    assert stages[-1]["end"] == figures["startup_s"]
    assert [(row["batch"], row["ctx"]) for row in figures["decode"]] == [(1, 24), (3, 24)]
    for row in figures["decode"]:
        assert row.keys() == {"batch", "ctx", "prefill_s", "tpot_ms", "tok_s", "floor_ms", "share", "rounds_ms"}
        assert len(row["rounds_ms"]) == 2
        assert row["prefill_s"] > 0
        assert row["tok_s"] == pytest.approx(row["batch"] / row["tpot_ms"] * 1e3)
        assert row["share"] == pytest.approx(row["floor_ms"] / row["tpot_ms"])
    assert printed.count("TPOT") == 2
    assert len(re.findall(r"floor \d+\.\d\d ms \(\d+%\)", printed)) == 2
    assert "first token after" in printed


@pytest.mark.parametrize("deterministic", ["false", "true"])
def test_deterministic_mode_is_compared_in_the_same_run(
    fluent_process: Fluent, model: str, tmp_path: Path, deterministic: str
) -> None:
    """Whichever of the two the settings ask for: a second engine is timed in turns with it, and the ratio is given."""
    file = tmp_path / "latency.json"
    sizes = ("--batch", "1,4", "--ctx", "24", "--steps", "16", "--rounds", "3", "--json", str(file))
    chosen = ("--compare-deterministic", "--set", f"engine.deterministic={deterministic}", "--set", "model.dtype=float32")
    printed = fluent_process("bench", "latency", model, *sizes, *chosen, *DUMMY).stdout
    figures = json.loads(file.read_text())
    assert [row["batch"] for row in figures["decode"]] == [1, 4]
    for row in figures["decode"]:
        other = row["beside"]
        assert other["deterministic"] is (deterministic == "false")
        assert len(other["rounds_ms"]) == len(row["rounds_ms"]) == 3
        plain, fixed = (row, other) if other["deterministic"] else (other, row)
        assert row["slowdown"] == pytest.approx(fixed["tpot_ms"] / plain["tpot_ms"])
        assert row["prefill_slowdown"] == pytest.approx(fixed["prefill_s"] / plain["prefill_s"])
        said = f"TPOT {fixed['tpot_ms']:.2f} ms instead of {plain['tpot_ms']:.2f} ({row['slowdown']:.2f} ×)"
        assert f"deterministic mode: {said}" in printed


def test_deterministic_mode_alone_says_how_to_compare(fluent_process: Fluent, model: str) -> None:
    sizes = ("--batch", "1", "--ctx", "24", "--steps", "16", "--rounds", "1")
    printed = fluent_process("bench", "latency", model, *sizes, "--set", "engine.deterministic=true", *DUMMY).stdout
    assert "--compare-deterministic measures its slowdown" in printed


def test_rounds_of_two_engines_take_turns(model: str) -> None:
    """After a warm-up of each, in which both capture what they would while the other one is timed."""
    asked: list[Ask | str] = []

    class Turns:
        about = About(deterministic=True, weight_precision="float32")

        def round(self, ask: Ask) -> tuple[float, float]:
            asked.append(ask)
            return 1.0, 1.0 + 16 * 0.25

    given = {"model.name": model, "model.load_format": "dummy", "engine.device": "cpu", "engine.threads": 1}
    with LocalEngine(config.load(None, given, {}).settings) as local:
        submit = local.generation.client.submit
        local.generation.client.submit = lambda request: (asked.append("ours"), submit(request))[1]  # type: ignore[method-assign]
        [row] = offline.latency(local, [1], 24, 16, rounds=2, tell=lambda _: None, beside=Turns())  # type: ignore[arg-type]
    warm, ask = Ask(1, 24, 16, prepare=True), Ask(1, 24, 16)
    ours = ["ours", "ours"]
    assert asked == [*ours, warm, *ours, ask, *ours, ask]
    assert (row["beside"]["tpot_ms"], row["beside"]["rounds_ms"]) == (250, [250, 250])
    assert row["slowdown"] == pytest.approx(250 / row["tpot_ms"])


def test_settings_of_two_engines(model: str) -> None:
    """On a GPU both must fit, and an idle one must have nothing left to capture."""
    settings = config.load(None, {"engine.memory_share": 0.8}, {}).settings
    ours, other = pair(settings, 8)
    assert (ours.engine.deterministic, other.engine.deterministic) == (False, True)
    assert (ours.engine.memory_share, other.engine.memory_share) == (0.4, 0.8)
    assert ours.scheduler.max_running == other.scheduler.max_running == 8
    assert settings.scheduler.max_running is None
    given = {"engine.deterministic": True, "kv.memory": "1GiB", "scheduler.max_running": 5}
    ours, other = pair(config.load(None, given, {}).settings, 3)
    assert (ours.engine.deterministic, other.engine.deterministic) == (True, False)
    assert ours.engine.memory_share == other.engine.memory_share
    assert ours.scheduler.max_running == other.scheduler.max_running == 5


def test_what_the_second_engine_cannot_do_is_said(model: str) -> None:
    given = {"model.name": model, "model.load_format": "dummy", "engine.device": "cpu", "kv.memory": "1KiB"}
    with pytest.raises(FluentError, match=r"The second engine: kv\.memory 1KiB holds 0 pages.*Set kv\.memory to"):
        Beside(config.load(None, given, {}).settings)


def test_throughput(fluent_process: Fluent, model: str, tmp_path: Path) -> None:
    """Every request gets exactly what was asked for, end-of-sequence tokens or not."""
    file = tmp_path / "throughput.json"
    arguments = ("--requests", "9", "--input-len", "10:40", "--output-len", "7", "--rounds", "2", "--json", str(file))
    fluent_process("bench", "throughput", model, *arguments, *DUMMY)
    figures = json.loads(file.read_text())
    check_environment(figures, "throughput")
    found = figures["throughput"]
    assert (found["requests"], found["out_tokens"]) == (9, 63)
    assert 90 <= found["in_tokens"] <= 360
    assert found["tok_s"] == found["rounds_tok_s"][-1] == pytest.approx(63 / found["s"])
    assert len(found["rounds_tok_s"]) == 2
    assert figures["startup_s"] > 0


def test_a_benchmark_with_speculation_says_so(fluent_process: Fluent, model: str, tmp_path: Path) -> None:
    file = tmp_path / "speculative.json"
    chosen = ("--set", "speculative.method=pld", "--set", "speculative.k=2")
    sizes = ("--requests", "2", "--input-len", "64", "--output-len", "32")
    fluent_process("bench", "throughput", model, *sizes, "--json", str(file), *DUMMY, *chosen)
    found = json.loads(file.read_text())["speculative"]
    assert (found["method"], found["k"]) == ("pld", 2)
    assert 0 <= found["accepted"] <= found["drafted"]


MEASURED = {
    "latency": ("--batch", "2", "--ctx", "9", "--steps", "8", "--rounds", "1"),
    "throughput": ("--requests", "2", "--input-len", "9", "--output-len", "8"),
}


@pytest.mark.parametrize("command", MEASURED)
def test_a_draft_model_by_its_flag(fluent: Fluent, tmp_path: Path, command: str) -> None:
    """Trained for another target, and random as it is: it drafts, which is what is asked here."""
    target, draft = str(write_tiny_llama(tmp_path / "target")), write_draft(tmp_path / "draft", "eagle3")
    file = tmp_path / "figures.json"
    chosen = ("--speculative", "eagle", "--speculative-model", str(draft), "--speculative-k", "2")
    printed = fluent("bench", command, target, *MEASURED[command], *chosen, "--json", str(file), *DUMMY).stdout
    assert "eagle, k 2: " in printed
    found = json.loads(file.read_text())["speculative"]
    assert (found["method"], found["k"]) == ("eagle", 2)
    assert found["drafted"] > 0
    errors = fluent(
        "bench", command, target, "--speculative=eagle", f"--speculative-model={tmp_path}/no", *DUMMY, code=2
    ).stderr
    assert f"speculative.model: There is no model at '{tmp_path}/no'" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("latency", "--batch", "1,x"), "--batch holds 'x'"),
        (("latency", "--batch", "0"), "--batch holds '0'"),
        (("throughput", "--input-len", "9:3"), "--input-len is '9:3'"),
        (("throughput", "--output-len", "few"), "--output-len holds 'few'"),
        (("latency", "--batch", "8", "--set", "scheduler.max_running=4"), "scheduler.max_running=8"),
        (("latency", "--batch", "2", "--ctx", "300", "--set", "kv.memory=256KiB"), "KV pool"),
        (("latency", "--batch", "1", "--ctx", "600"), "exceed the context of 512"),
        (("serve", "--url", "http://127.0.0.1:9"), "http://127.0.0.1:9 does not answer"),
    ],
)
def test_what_cannot_be_measured_is_said(fluent: Fluent, model: str, arguments: tuple[str, ...], message: str) -> None:
    command, *rest = arguments
    given = rest if command == "serve" else [model, *rest, *DUMMY]
    assert message in fluent("bench", command, *given, code=2).stderr


class TestServe:
    """`fluent bench serve` against a real server."""

    @pytest.fixture(scope="class")
    @staticmethod
    def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
        folder = tmp_path_factory.mktemp("served")
        server = Server(folder / "tiny", "--api-key", "secret", temporary=folder)
        yield server.url
        server.client.close()
        server.process.terminate()
        server.wait_end()

    def test_figures(self, fluent_process: Fluent, url: str, tmp_path: Path) -> None:
        file = tmp_path / "serve.json"
        sizes = ("--requests", "6", "--rate", "20", "--input-len", "8:16", "--output-len", "5")
        printed = fluent_process(
            "bench", "serve", "--url", url, *sizes, "--json", str(file), FLUENT_SERVER__API_KEY="secret"
        ).stdout
        figures = json.loads(file.read_text())
        check_environment(figures, "serve")
        found = figures["serve"]
        assert (found["requests"], found["failed"], found["errors"], found["out_tokens"]) == (6, 0, [], 30)
        for name in ("ttft_ms", "tpot_ms", "itl_ms"):
            assert found[name].keys() == {"mean", "p50", "p90", "p99"}
            assert 0 < found[name]["p50"] <= found[name]["p99"]
        assert found["goodput_requests_s"] == pytest.approx(found["requests_s"])
        assert "goodput" in printed

    def test_a_goal_that_nothing_meets(self, fluent_process: Fluent, url: str, tmp_path: Path) -> None:
        file = tmp_path / "serve.json"
        sizes = ("--requests", "3", "--rate", "0", "--input-len", "8", "--output-len", "4", "--ttft-goal", "0")
        fluent_process("bench", "serve", "--url", f"{url}/v1", *sizes, "--api-key", "secret", "--json", str(file))
        found = json.loads(file.read_text())["serve"]
        assert found["goodput_requests_s"] == 0
        assert found["requests_s"] > 0

    def test_a_server_that_refuses(self, fluent_process: Fluent, url: str) -> None:
        errors = fluent_process("bench", "serve", "--url", url, "--requests", "1", code=2).stderr
        assert "refused /v1/models: The API key is missing or wrong. Send the header" in errors
        assert "--api-key" in errors

    def test_lengths_over_the_servers_context(self, fluent_process: Fluent, url: str) -> None:
        arguments = ("--input-len", "8000", "--output-len", "200:300", "--api-key", "secret")
        errors = fluent_process("bench", "serve", "--url", url, *arguments, code=2).stderr
        assert "8000 prompt tokens and 300 new ones exceed the server's context of 8192" in errors


def test_summary_of_samples() -> None:
    """Times by their definitions: TTFT from sending to the first chunk, TPOT over the tokens after the first, ITL between
    chunks; a request that failed counts in no time."""
    samples = [
        Sample(sent=0.0, chunks=[1.0, 1.5, 3.0], tokens=5),
        Sample(sent=10.0, chunks=[10.1], tokens=1),
        Sample(sent=20.0, error="500: no"),
    ]
    load = Load("", 3, 1.0, (1, 1), (1, 1), 0, ttft_goal=0.5, tpot_goal=1.0)
    found = summary(samples, 40.0, load)
    assert (found["requests"], found["failed"], found["errors"]) == (3, 1, ["500: no"])
    assert found["ttft_ms"]["mean"] == pytest.approx(550)
    assert found["tpot_ms"]["p50"] == pytest.approx(500)
    assert found["itl_ms"]["mean"] == pytest.approx(1000)
    assert found["tok_s"] == pytest.approx(6 / 40)
    assert found["goodput_requests_s"] == pytest.approx(1 / 40)


def test_percentiles() -> None:
    values = [float(i) for i in range(100, 0, -1)]
    found = percentiles(values)
    assert found == {"mean": statistics.fmean(values), "p50": 51, "p90": 91, "p99": 100}
    assert percentiles([3.0]) == {"mean": 3, "p50": 3, "p90": 3, "p99": 3}
    assert percentiles([]) == {"mean": 0, "p50": 0, "p90": 0, "p99": 0}


def test_latency_is_the_difference_of_two_medians_over_fresh_prompts(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TPOT = (time for steps + 1 new tokens − time for 1) / steps, after a round that does not count."""
    ran: list[tuple[list[list[int]], list[int], float]] = []
    run = offline._run

    async def noted(client: Any, prompts: list[list[int]], new: list[int], *rest: Any) -> Any:
        result = await run(client, prompts, new, *rest)
        ran.append((prompts, new, result[0]))
        return result

    monkeypatch.setattr(offline, "_run", noted)
    given = {"model.name": model, "model.load_format": "dummy", "engine.device": "cpu", "engine.threads": 1}
    with LocalEngine(config.load(None, given, {}).settings) as local:
        [row] = offline.latency(local, [2], 40, 24, rounds=3, tell=lambda _: None)
    assert [new for _, new, _ in ran] == [[1, 1], [25, 25]] * 4
    firsts, alls = ([seconds for _, _, seconds in ran[start::2]] for start in (2, 3))
    assert row["prefill_s"] == statistics.median(firsts)
    assert row["tpot_ms"] == pytest.approx((statistics.median(alls) - statistics.median(firsts)) / 24 * 1e3)
    assert row["rounds_ms"] == pytest.approx([(whole - first) / 24 * 1e3 for first, whole in zip(firsts, alls, strict=True)])
    prompts = [tuple(prompt) for given_prompts, _, _ in ran for prompt in given_prompts]
    assert {len(prompt) for prompt in prompts} == {40}
    assert len({prompt[:16] for prompt in prompts}) == len(prompts) == 16
