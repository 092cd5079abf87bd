"""The timeline of a start: stages of several processes on one axis."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from fluentllm.core.timeline import Timeline, lines, process_start
from fluentllm.core.types import Stage


def test_a_process_knows_when_it_was_created() -> None:
    before = time.time()
    code = "import time; time.sleep(0.5); from fluentllm.core.timeline import process_start; print(process_start())"
    created = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert before - 0.05 <= created <= before + 0.4  # not when the module was imported
    assert process_start() == pytest.approx(process_start(), abs=0.02)


def test_stages_count_from_the_origin_of_the_first_process() -> None:
    first = Timeline("supervisor")
    second = Timeline("engine", first.origin)
    with first.stage("model files"), second.stage("weights"):
        time.sleep(0.02)
    with pytest.raises(ValueError, match="no weights"), second.stage("failed"):
        raise ValueError("no weights")
    stages = [*first.stages, *second.stages]
    assert [(stage.process, stage.name) for stage in stages] == [
        ("supervisor", "process"),
        ("supervisor", "model files"),
        ("engine", "process"),
        ("engine", "weights"),
    ]
    assert first.stages[0].start == 0
    assert all(0 <= stage.start <= stage.end <= first.now() + 1e-4 for stage in stages)  # they are rounded
    assert 0.02 <= second.stages[1].end - second.stages[1].start < 1


def test_lines_for_people() -> None:
    stages = [
        Stage("engine", "weights", 2.0, 3.25),
        Stage("engine", "process", 0.0, 0.5),
        Stage("front end", "tokenizer", 1, 2),
    ]
    assert lines(stages) == ["engine: process 0.0–0.5, weights 2.0–3.2 s", "front end: tokenizer 1.0–2.0 s"]
