"""`examples/train_nano`, whole at toy size: what it writes loads here, and computes what was trained."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from driver import Driver
from expert_oracle import Drafter
from oracle import load_ours, relative_error
from safetensors.torch import load_file

from fluentllm import LLM, SamplingOptions

ROOT = Path(__file__).parents[2]
NAMES = ("longcat-nano", "longcat-nano-ngram")
SEQUENCES = [[7, 300, 5, 0, 41, 41, 9, 12, 460, 33, 2, 17, 8], [0, 0, 99, 98, 97, 99, 98, 97, 1]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder, and what was printed."""
    folder = tmp_path_factory.mktemp("nano")
    command = [sys.executable, "-m", "examples.train_nano", "--out", str(folder), "--tiny", "--steps", "12", "--device", "cpu"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def network(trained: tuple[Path, str], name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT))
    from examples.train_nano.__main__ import NANO, NGRAM, TINY
    from examples.train_nano.checkpoint import load

    shape = replace(NGRAM if name.endswith("ngram") else NANO, **TINY)
    with torch.no_grad():
        yield load(shape, trained[0] / name)


def test_the_logits_are_the_trained_networks(trained: tuple[Path, str], name: str, network: Any) -> None:
    driver = Driver(load_ours(trained[0] / name), SEQUENCES)
    ours = driver.run([(i, 0, len(tokens)) for i, tokens in enumerate(SEQUENCES)])
    for mine, tokens in zip(ours, SEQUENCES, strict=True):
        assert relative_error(mine, network.logits(network(torch.tensor([tokens])))[0]) < 1e-4


def test_the_drafts_are_the_trained_networks(trained: tuple[Path, str], name: str, network: Any) -> None:
    """Along a chain that starts at each row: the states of the target up to there, then the layer's own."""
    model = load_ours(trained[0] / name)
    for number, tokens in enumerate(SEQUENCES):
        hidden = network(torch.tensor([tokens]))
        expected = network.drafts(torch.tensor([tokens]), hidden, 3)
        for start in range(len(tokens) - 3):
            drafter = Drafter(model, SEQUENCES)
            states = torch.cat((torch.zeros_like(hidden[0, :1]), hidden[0, :start]))
            state = drafter.draft(states, drafter.batch([(number, 0, start + 1)]))[-1:]
            for depth in range(3):
                assert relative_error(state, expected[depth][0, start + depth : start + depth + 1]) < 1e-4, (start, depth)
                at = start + depth + 1
                state = drafter.draft(state, drafter.batch([(number, at, 1)], decode=True))


def test_it_generates_with_its_own_drafts(trained: tuple[Path, str], name: str) -> None:
    tokens = {}
    settings = {"engine.threads": 1, "engine.device": "cpu", "model.dtype": "float32", "speculative.k": 2}
    for method in ("none", "mtp"):
        settings["speculative.method"] = method
        with LLM(str(trained[0] / name), settings=settings) as llm:
            answers = llm.generate(["import os\n", "class A:"], SamplingOptions(max_tokens=12, temperature=0, ignore_eos=True))
        tokens[method] = [answer.tokens for answer in answers]
        assert method == "none" or sum(answer.drafted for answer in answers) > 0
    assert tokens["none"] == tokens["mtp"]


def test_further_training_changes_the_draft_layer_alone(trained: tuple[Path, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.train_nano", "--out", str(tmp_path), "--tiny", "--steps", "3", "--device", "cpu"]
    # As many sequences as the steps take; else they would be written for a third of the time that training has by default.
    command += ["--start", str(trained[0]), "--only", NAMES[1], "--sequences", "12"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    before, after = (load_file(folder / NAMES[1] / "model.safetensors") for folder in (trained[0], tmp_path))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "model.mtp.layers.0.eh_proj.weight" in changed
    assert all(name.startswith("model.mtp.") for name in changed)
    assert (trained[0] / NAMES[1] / "tokenizer.json").read_text() == (tmp_path / NAMES[1] / "tokenizer.json").read_text()


def test_it_reports_what_it_is_worth(trained: tuple[Path, str], name: str) -> None:
    for figure in ("perplexity", "by depth: .*", r"mean accepted length at K = 3, greedy:"):
        assert re.search(rf"^{name}: .*{figure} ?[0-9.]+", trained[1], re.M), trained[1]
