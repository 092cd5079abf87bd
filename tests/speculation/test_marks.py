"""Synthetic acceptance says so wherever its figures or answers come out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from engine.harness import write_tiny_llama
from engine.test_every_model import LONGCAT
from typer.testing import CliRunner

from fluentllm.cli import create_app
from fluentllm.core.types import KVSpec, ModelInfo, ModelSpec, SpeculativeInfo
from fluentllm.processes.banner import banner

from . import mtp

if TYPE_CHECKING:
    from pathlib import Path


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


def test_bench(tmp_path: Path) -> None:
    """MTP on random weights, as speed is measured."""
    model, file = write_tiny_llama(tmp_path / "longcat", base=LONGCAT), tmp_path / "figures.json"
    sets = ("speculative.method=mtp", "speculative.k=3", "speculative.synthetic_acceptance=3.0", "engine.threads=1")
    arguments = ["bench", "throughput", str(model), "--requests", "8", "--input-len", "9", "--output-len", "90"]
    options = ["--load-format", "dummy", "--device", "cpu", "--json", str(file), *(f"--set={s}" for s in sets)]
    result = CliRunner().invoke(create_app(), [*arguments, *options])
    assert result.exit_code == 0, result.output
    assert "SYNTHETIC" in result.output
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
