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
from fluentllm.core.errors import ConfigError
from fluentllm.jobs.job import load_job, parse_line
from fluentllm.jobs.output import OutputFile

from engine.harness import write_tiny_llama


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


def start(job: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fluentllm.cli", "run", str(job)]
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
    ]
    job = write_job(tmp_path, lines)
    process = start(job)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    found = results(job)
    assert [r["index"] for r in found] == list(range(6))
    assert found[0]["id"] == "first"
    assert found[0]["usage"]["completion_tokens"] <= 30
    assert "exactly one" in found[2]["error"]
    assert found[3]["choices"][0] == found[3]["choices"][1]
    assert "temperature" in found[4]["error"]
    assert "tools" in found[5]["error"]


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


def test_an_output_of_another_job_is_not_touched(tmp_path: Path) -> None:
    job = load_job(write_job(tmp_path, [{"prompt": "x"}]))
    with OutputFile(job) as output:
        assert output.done == 0
        with pytest.raises(ConfigError, match="Another run"):
            OutputFile(job)
    (tmp_path / "out.jsonl").write_text('{"index":0,"error":"x"}\n')
    job.sampling.max_tokens = 7
    with pytest.raises(ConfigError, match="another job"):
        OutputFile(job)


def test_mistakes_in_a_job_file_are_named(tmp_path: Path) -> None:
    path = write_job(tmp_path, [], inputs="x")
    with pytest.raises(ConfigError, match="inputs"):
        load_job(path)
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_job(tmp_path / "nowhere.yaml")


def test_a_line_overrides_the_jobs_sampling(tmp_path: Path) -> None:
    job = load_job(write_job(tmp_path, []))
    line, options = parse_line(b'{"prompt": "x", "id": 3, "max_tokens": 2, "stop": "."}', job.sampling)
    assert (line.id, options.max_tokens, options.temperature, options.stop) == (3, 2, 1.0, ".")
