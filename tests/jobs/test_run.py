"""`fluent run` on a tiny random model: order, errors, resuming after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from engine.harness import write_tiny_llama

from fluentllm.core import config
from fluentllm.core.errors import ConfigError, InvalidRequest
from fluentllm.frontend.sampling import SamplingOptions
from fluentllm.jobs.job import load_job, parse_line
from fluentllm.jobs.output import OutputFile, fingerprint


def write_job(folder: Path, lines: list[dict[str, Any]], **changes: Any) -> Path:
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = write_tiny_llama(folder / "model", vocab_size=512)
    job = {
        "input": "in.jsonl",
        "output": "out.jsonl",
        "sampling": {"max_tokens": 6, "temperature": 1.0},
        "settings": {
            "model": {"name": str(model), "load_format": "dummy"},
            "engine": {"threads": 1, "deterministic": True, "device": "cpu"},
        },
        **changes,
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return folder / "job.yaml"


def start(job: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fluentllm.cli", "run", str(job), *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "FLUENT_PLUGINS": ""})


def results(job: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.parent / "out.jsonl").read_text().splitlines()]


def test_results_come_in_order_and_a_bad_line_has_its_error(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"prompt": "a long one " * 5, "max_tokens": 30, "id": "first"},
        {"prompt": "short", "max_tokens": 1},
        {"prompt": "both", "messages": []},
        {"prompt": [3, 4, 5], "temperature": 0, "n": 2},
        {"prompt": "x", "temperature": 9},
        {"prompt": "x", "tools": []},
        {"messages": [{"role": "user", "content": "hi"}], "temperature": 0},
        {"prompt": "user: hi", "temperature": 0},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "bob", "content": "hi"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "temperature": 0},
        {"prompt": "none", "max_tokens": 0},
    ]
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}")
    job = write_job(tmp_path, lines)
    settings = yaml.safe_load(job.read_text())["settings"]
    settings["model"]["chat_template"] = str(template)
    job = write_job(tmp_path, lines, settings=settings)
    process = start(job)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    found = results(job)
    assert [r["index"] for r in found] == list(range(12))
    assert found[0]["id"] == "first"
    assert found[0]["usage"]["completion_tokens"] <= 30
    assert "exactly one" in found[2]["error"]
    assert found[3]["choices"][0] == found[3]["choices"][1]
    assert "temperature" in found[4]["error"]
    assert "tools" in found[5]["error"]
    assert found[6]["choices"] == found[7]["choices"], "a chat is its rendered template"
    assert "content" in found[8]["error"]
    assert "bob" in found[9]["error"]
    assert found[10]["choices"] == found[6]["choices"], "in parts"
    assert "max_tokens is 0" in found[11]["error"]
    assert "12 results in" in errors
    assert "6 of them errors" in errors


def test_a_line_of_nothing_but_brackets_is_no_line() -> None:
    with pytest.raises(InvalidRequest, match="Not a line"):
        parse_line(b"[" * 100_000, SamplingOptions())


def test_a_killed_run_goes_on_and_loses_nothing(tmp_path: Path) -> None:
    lines = [{"prompt": f"line {i}", "max_tokens": 20 + i % 7, "ignore_eos": True} for i in range(60)]
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = write_job(tmp_path / "whole", lines, concurrency=4)
    assert start(whole).wait(timeout=120) == 0

    killed = write_job(tmp_path / "killed", lines, concurrency=4)
    process = start(killed)
    output = killed.parent / "out.jsonl"
    while not output.exists() or output.stat().st_size == 0:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(results(killed))
    assert 0 < before < 60, "the kill came too late to show anything"
    with output.open("ab") as file:
        file.write(b'{"index": 99, "half a li')
    process = start(killed)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert f"{before} of 60" in errors
    assert results(killed) == results(whole)


def open_output(job_file: Path, **sampling: Any) -> OutputFile:
    job, section = load_job(job_file)
    for name, value in sampling.items():
        setattr(job.sampling, name, value)
    return OutputFile(Path(job.output), fingerprint(job, config.load(section, {}, {}).settings))


def test_an_output_of_another_job_is_not_touched(tmp_path: Path) -> None:
    job = write_job(tmp_path, [{"prompt": "x"}])
    with open_output(job) as output:
        assert output.done == 0
        with pytest.raises(ConfigError, match="Another run"):
            open_output(job)
    (tmp_path / "out.jsonl").write_text('{"index":0,"error":"x"}\n')
    with open_output(job) as output:
        assert output.done == 1
    with pytest.raises(ConfigError, match="another job"):
        open_output(job, max_tokens=7)
    with job.open("a") as file:
        file.write("concurrency: 3\n")
    with open_output(job) as output:
        assert output.done == 1, "what the machine can bear may change between two runs"
    settings = {"model": {"name": "another", "load_format": "dummy"}}
    with pytest.raises(ConfigError, match="another job"):
        open_output(write_job(tmp_path, [{"prompt": "x"}], settings=settings))
    write_job(tmp_path, [{"prompt": "y"}])
    with pytest.raises(ConfigError, match="another job"):
        open_output(job)


@pytest.mark.parametrize("line", [b"[]\n", b"\xff\n", b'{"index":1}\n', b"\n"])
def test_an_output_that_somebody_edited_is_not_continued(tmp_path: Path, line: bytes) -> None:
    job = write_job(tmp_path, [{"prompt": "x"}])
    open_output(job).__exit__()
    (tmp_path / "out.jsonl").write_bytes(line)
    with pytest.raises(ConfigError, match=r"out\.jsonl, line 1"):
        open_output(job)


@pytest.mark.parametrize(
    ("change", "message", "fix"),
    [
        ({"inputs": "x"}, r"line \d+: unknown key 'inputs' \(its value: 'x'\)", "Did you mean input?"),
        ({"sampling": {"temprature": 1}}, "unknown key 'sampling.temprature'", "sampling.temperature"),
        ({"sampling": {"top_p": "high"}}, r"line \d+: sampling.top_p is 'high': Expected", ""),
        ({"concurrency": 0}, r"concurrency is 0: Expected `int` >= 1", ""),
        ({"settings": "smollm2"}, "settings is 'smollm2', not a section", "settings:"),
    ],
)
def test_mistakes_in_a_job_file_are_named(tmp_path: Path, change: dict[str, Any], message: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        load_job(write_job(tmp_path, [], **change))
    assert fix in str(raised.value.fix)


def test_what_is_missing_in_a_job_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_job(tmp_path / "nowhere.yaml")
    (tmp_path / "job.yaml").write_text("input: in.jsonl\n")
    with pytest.raises(ConfigError, match="output"):
        load_job(tmp_path / "job.yaml")


def test_settings_of_a_job_are_checked_like_those_of_a_server(tmp_path: Path) -> None:
    """Their mistakes have the job file's lines; environment and command line beat them."""
    settings = {"engine": {"threads": 3, "device": "cpu"}}
    _, section = load_job(write_job(tmp_path, [], settings=settings))
    assert config.load(section, {}, {}).settings.engine.threads == 3
    loaded = config.load(section, {}, {"FLUENT_ENGINE__THREADS": "2"})
    assert (loaded.settings.engine.threads, loaded.settings.engine.device) == (2, "cpu")
    assert config.load(section, {"engine.threads": "1"}, {"FLUENT_ENGINE__THREADS": "2"}).settings.engine.threads == 1
    job = write_job(tmp_path, [], settings={"engine": {"thread": 3}})
    line = job.read_text().splitlines().index("    thread: 3") + 1
    with pytest.raises(ConfigError, match=rf"job\.yaml, line {line}: unknown key 'engine\.thread'"):
        config.load(load_job(job)[1], {}, {})


def test_a_line_overrides_the_jobs_sampling(tmp_path: Path) -> None:
    job, _ = load_job(write_job(tmp_path, []))
    line, options = parse_line(b'{"prompt": "x", "id": 3, "max_tokens": 2, "stop": "."}', job.sampling)
    assert (line.id, options.max_tokens, options.temperature, options.stop) == (3, 2, 1.0, ".")


def test_paths_are_relative_to_the_job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    job, _ = load_job(write_job(tmp_path, [], output="~/out.jsonl"))
    assert job.input == str(tmp_path / "in.jsonl")
    assert job.output == "/home/ada/out.jsonl"


def test_more_choices_than_the_queue_holds_wait_for_room(tmp_path: Path) -> None:
    """No line gets the engine's "queue is full" for a result."""
    lines = [{"prompt": [i + 3], "n": 5, "max_tokens": 3} for i in range(8)]
    job = write_job(tmp_path, lines)
    limits = ["--set", "scheduler.max_waiting=6", "--set", "scheduler.max_running=2"]
    process = start(job, *limits)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert [len(r.get("choices", ())) for r in results(job)] == [5] * 8
