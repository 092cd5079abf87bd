"""What is counted of drafts, and acceptance at random for benchmarks."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from engine.harness import Harness

from fluentllm.assembly import assemble
from fluentllm.core.errors import ConfigError
from fluentllm.step.synthetic import share_for

from .mtp import Reference, harness
from .proposers import plugins_with
from .watching import Drafted, unchanged, watched


async def test_counts_by_position(tiny: Harness) -> None:
    """Drafts that are right twice and then wrong."""
    prompt = random.Random(3).choices(range(3, 160), k=20)
    async with tiny.engine(**{"speculative.method": "none"}) as running:
        answer = await running.tokens(prompt, max_tokens=31, ignore_eos=True)
    text = [*prompt, *answer, 0, 0, 0, 0]

    def draft(tables: Any, batch: Any, hidden: Any, slots: torch.Tensor, count: int) -> Any:
        drafts = torch.zeros(len(slots), count, dtype=torch.int64)
        for row, slot in enumerate(slots.tolist()):
            length = int(tables.length[slot])
            follow = text[length : length + count]
            drafts[row] = torch.tensor([*follow[:2], *((t + 1) % 160 for t in follow[2:])])
        return drafts, torch.full((len(slots),), count)

    async with tiny.engine(plugins=plugins_with(draft), **{"speculative.method": "test"}) as running:
        outputs = await running.outputs(running.submit(prompt, max_tokens=31, ignore_eos=True))
        assert [t for o in outputs for t in o.tokens] == answer
        stats = running.engine.stats().speculative
    assert stats is not None
    # The first token comes from the prompt; the other 30 in steps of three.
    assert stats.verifications == 10
    assert stats.drafted == [10, 10, 10]
    assert stats.accepted == [10, 10, 0]
    assert stats.mean_accepted_length == 3.0
    assert (stats.info.method, stats.info.k, stats.info.max_k, stats.info.synthetic_acceptance) == ("test", 3, 3, None)
    assert sum(o.drafted for o in outputs) == 30
    assert sum(o.accepted for o in outputs) == 20


async def test_no_statistics_without_speculation(tiny: Harness) -> None:
    async with tiny.engine(**{"speculative.method": "none"}) as running:
        assert running.engine.stats().speculative is None
        assert running.engine.info.speculative is None


@pytest.mark.parametrize(("length", "drafts"), [(1.0, 3), (2.2, 3), (3.0, 3), (4.0, 3), (2.0, 1), (3.3, 5)])
def test_share_of_drafts_to_accept(length: float, drafts: int) -> None:
    share = share_for(length, drafts)
    assert 0 <= share <= 1
    assert sum(share**j for j in range(drafts + 1)) == pytest.approx(length)


@pytest.mark.parametrize("length", [1.0, 2.5, 4.0])
async def test_synthetic_acceptance(tiny: Harness, length: float) -> None:
    def draft(tables: Any, batch: Any, hidden: Any, slots: torch.Tensor, count: int) -> Any:
        return torch.full((len(slots), count), 7), torch.full((len(slots),), count)

    settings = {"speculative.method": "test", "speculative.synthetic_acceptance": length, "model.max_model_len": 512}
    answers = []
    for _ in range(2):
        async with tiny.engine(plugins=plugins_with(draft), **settings) as running:
            ids = [running.submit([9, i + 1], max_tokens=120, ignore_eos=True, seed=i) for i in range(4)]
            answers.append([await running.rest(i) for i in ids])
            stats = running.engine.stats().speculative
            assert stats is not None
            assert stats.mean_accepted_length == pytest.approx(length, abs=0.08 if length in (1, 4) else 0.4)
            assert stats.info.synthetic_acceptance == length
    assert answers[0] == answers[1], "the coins are those of seed and position"


async def test_synthetic_acceptance_leaves_positions_and_kv_consistent(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The accepted drafts are the history: what MTP drafts after it is what it drafts from scratch."""
    model = harness(tmp_path_factory.mktemp("synthetic"), "deepseek_v3")
    record: list[Drafted] = []
    plugins = watched("mtp", record, unchanged)
    settings = {"speculative.method": "watched", "speculative.k": 3, "speculative.synthetic_acceptance": 3.0}
    async with model.engine(plugins=plugins, **settings) as running:
        tokens = await running.tokens([5, 6, 7], max_tokens=40, ignore_eos=True)
    reference = Reference(model.loaded.model)
    assert len(tokens) == 40
    assert len(record) < 30
    assert sum(drafted.check(reference) for drafted in record) > 0.95 * sum(len(drafted.drafts) for drafted in record)


def test_more_than_the_drafts_is_refused(tiny: Harness) -> None:
    settings = {"speculative.method": "pld", "speculative.k": 2, "speculative.synthetic_acceptance": 3.5}
    with pytest.raises(ConfigError, match=r"synthetic_acceptance is 3.5, but 2 drafts"):
        assemble(tiny.settings(**settings), "tiny", tiny.loaded, tiny.plugins)
    settings = {"speculative.method": "none", "speculative.synthetic_acceptance": 2.0}
    with pytest.raises(ConfigError, match=r"choose a speculative\.method"):
        assemble(tiny.settings(**settings), "tiny", tiny.loaded, tiny.plugins)
