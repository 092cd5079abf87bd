"""What the API's `usage` says of drafts: streamed or not, counted by the engine, absent without speculation."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from api.conftest import TINY, serving_real
from frontend.checkpoints import write_chat_folder

if TYPE_CHECKING:
    from pathlib import Path

PLD = {"speculative.method": "pld", "speculative.k": 3, "plugins.spec_pld.shortest": 1}
BODY: dict[str, Any] = {
    "model": "tiny",
    "prompt": [5, 6, 7, 5, 6, 7, 5],
    "max_tokens": 40,
    "temperature": 0,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_chat_folder(tmp_path_factory.mktemp("usage"))
    (folder / "config.json").write_text(json.dumps(TINY))
    return folder


async def usages(folder: Path, **settings: Any) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Of the answer whole and streamed, and the engine's own statistics."""
    async with serving_real(folder, **settings) as api:
        whole = (await api.http.post("/v1/completions", json=BODY)).json()["usage"]
        stats = api.engine.stats().speculative
        body = {**BODY, "stream": True, "stream_options": {"include_usage": True}}
        streamed = (await api.http.post("/v1/completions", json=body)).text
        events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
        return whole, events[-1]["usage"], stats


async def test_drafts_in_usage(folder: Path) -> None:
    whole, streamed, stats = await usages(folder, **PLD)
    details = whole["completion_tokens_details"]
    assert details["proposer"] == "pld"
    assert details["verified_by_position"] == stats.drafted
    assert details["accepted_by_position"] == stats.accepted
    assert details["accepted_prediction_tokens"] == sum(stats.accepted)
    assert details["rejected_prediction_tokens"] == sum(stats.drafted) - sum(stats.accepted) > 0
    assert streamed["completion_tokens"] == whole["completion_tokens"] == 40
    # The second answer finds its prompt in the cache; its drafts are the same.
    assert streamed["completion_tokens_details"] == details


async def test_nothing_is_said_without_speculation(folder: Path) -> None:
    for usage in (await usages(folder))[:2]:
        assert "completion_tokens_details" not in usage


async def test_synthetic_acceptance_says_so(folder: Path) -> None:
    for usage in (await usages(folder, **PLD, **{"speculative.synthetic_acceptance": 2.0}))[:2]:
        assert usage["completion_tokens_details"]["synthetic_acceptance"] == 2.0
