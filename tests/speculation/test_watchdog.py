"""Acceptance that collapses: told, switched off, tried again; with a fixed K too."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from engine.harness import Harness

from fluentllm.core import draft_watchdog
from fluentllm.core.draft_watchdog import ENOUGH, ENOUGH_AGAIN, FIRST_PAUSE, LAST_PAUSE, AcceptanceWatch

from .proposers import plugins_with


def pause(watch: AcceptanceWatch) -> int:
    """Steps until it allows drafts again."""
    steps = 0
    while not watch.allows():
        steps += 1
    return steps


def test_pauses_grow_until_drafts_are_right_again(caplog: pytest.LogCaptureFixture) -> None:
    watch = AcceptanceWatch(0.02, "proposer 'x'")
    with caplog.at_level(logging.INFO):
        watch.saw(ENOUGH - 1, 0)
        assert pause(watch) == 0
        watch.saw(1, 0)
        assert watch.collapsed
        watch.saw(10_000, 10_000)  # was launched before
        assert pause(watch) == FIRST_PAUSE
        for doubled in (2, 4, 8):
            watch.saw(ENOUGH_AGAIN, 0)
            assert pause(watch) == doubled * FIRST_PAUSE
        assert watch.collapses == 4
        watch.saw(ENOUGH_AGAIN, ENOUGH_AGAIN // 2)
        assert not watch.collapsed
        assert pause(watch) == 0
        watch.saw(ENOUGH_AGAIN, 0)
        assert pause(watch) == 0, "after a recovery it waits for as many as at first"
        watch.saw(ENOUGH, 0)
        assert pause(watch) == FIRST_PAUSE
    said = [record.getMessage() for record in caplog.records]
    assert len([text for text in said if "acceptance of proposer 'x' has collapsed: 0.0 %" in text]) == 5
    assert len([text for text in said if "are accepted again: 50.0 %" in text]) == 1


def test_the_longest_pause() -> None:
    watch = AcceptanceWatch(0.5)
    for _ in range(12):
        watch.saw(ENOUGH, 0)
        longest = pause(watch)
    assert longest == LAST_PAUSE


def test_rare_but_right_drafts_are_no_collapse() -> None:
    watch = AcceptanceWatch(0.02)
    for step in range(5000):
        watch.saw(1, int(step % 20 == 0))
    assert watch.collapses == 0
    off = AcceptanceWatch(0.0)
    off.saw(100_000, 0)
    assert not off.collapsed


@pytest.mark.parametrize("depth", [0, 2])
async def test_a_fixed_k(tiny: Harness, depth: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Wrong drafts, then right ones: the engine stops drafting, tries again, and goes on."""
    for name, value in (("ENOUGH", 12), ("ENOUGH_AGAIN", 4), ("FIRST_PAUSE", 20)):
        monkeypatch.setattr(draft_watchdog, name, value)
    prompt = [9, 8, 7]
    async with tiny.engine(**{"speculative.method": "none"}) as running:
        answer = await running.tokens(prompt, max_tokens=200, ignore_eos=True)
    text = [*prompt, *answer]

    def draft(tables: Any, batch: Any, hidden: Any, slots: torch.Tensor, count: int) -> Any:
        drafts = torch.zeros(len(slots), count, dtype=torch.int64)
        for row, slot in enumerate(slots.tolist()):
            length = int(tables.length[slot])
            follow = (text + [0] * count)[length : length + count]
            drafts[row] = torch.tensor(follow if length > 60 else [(token + 1) % 160 for token in follow])
        return drafts, torch.full((len(slots),), count)

    settings = {"speculative.method": "test", "engine.overlap_depth": depth}
    with caplog.at_level(logging.INFO):
        async with tiny.engine(plugins=plugins_with(draft), **settings) as running:
            watch = running.engine.draft_length.watch
            watch._enough, watch._pause = 12, 20
            outputs = await running.outputs(running.submit(prompt, max_tokens=200, ignore_eos=True))
            assert [t for o in outputs for t in o.tokens] == answer
            stats = running.engine.stats().speculative
    assert stats is not None
    assert stats.collapses >= 1
    assert not stats.collapsed
    assert stats.error is None
    drafted = [o.drafted for o in outputs]
    assert drafted[1:13] == [3] * 12 or depth
    gap = next(i for i in range(2, len(drafted)) if drafted[i : i + 15] == [0] * 15)
    assert any(drafted[gap + 15 :]), "tried again"
    assert sum(o.accepted for o in outputs) > 50
    text_of_log = caplog.text
    assert "acceptance of proposer 'test' has collapsed" in text_of_log
    assert "are accepted again" in text_of_log


async def test_auto_with_one_stream(tiny: Harness, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Drafts that are always wrong are only looked at: that is told too."""
    monkeypatch.setattr(draft_watchdog, "ENOUGH", 24)

    def draft(tables: Any, batch: Any, hidden: Any, slots: torch.Tensor, count: int) -> Any:
        return torch.full((len(slots), count), 2**40), torch.full((len(slots),), count)

    settings = {"speculative.method": "test", "speculative.k": "auto", "model.max_model_len": 512}
    async with tiny.engine(plugins=plugins_with(draft), **settings) as running:
        for seed in range(8):
            await running.tokens([9, 8, 7 + seed], max_tokens=400, ignore_eos=True, temperature=1.0, seed=seed)
            stats = running.engine.stats().speculative
            assert stats is not None
            if stats.collapses:
                break
    assert (stats.collapses, stats.collapsed, stats.error) == (1, True, None)
    assert "acceptance of proposer 'test' has collapsed: 0.0 % of its first drafts are right" in caplog.text
