"""`mtp` drafts what its layer computes from the whole history, wherever its KV came from, and changes no token."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from engine.harness import Harness, write_tiny_llama

from fluentllm.assembly import assemble
from fluentllm.core.errors import ConfigError

from .mtp import CONFIGS, Reference, harness
from .pressure import Case, under_pressure, work
from .watching import Drafted, unchanged, watched

if TYPE_CHECKING:
    from pathlib import Path


def page_bytes(model: Harness) -> int:
    spec = model.loaded.model.spec
    layers = spec.kv.layers + spec.draft_kv_layers
    return model.page_bytes(8) * layers // spec.kv.layers + spec.hidden_size * 4


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    model = harness(tmp_path_factory.mktemp(request.param), request.param)
    return Case(model, Reference(model.loaded.model), page_bytes(model))


@pytest.mark.parametrize(
    ("k", "depth", "prefill_first"),
    [(5, 0, False), (5, 1, False), (5, 2, False), (1, 2, False), (2, 1, False), (3, 0, False), (3, 1, True), (4, 2, True)],
)
async def test_drafts_and_tokens_under_pressure(case: Case, k: int, depth: int, prefill_first: bool) -> None:
    await under_pressure(case, "mtp", k, depth, **{"scheduler.prefill_first": prefill_first})


async def test_plain_decoding_drafts_the_same(case: Case) -> None:
    """One request after the other, whole prompts, no cache, a fixed K."""
    record: list[Drafted] = []
    settings = {"speculative.method": "watched", "speculative.k": 3, "kv.prefix_cache": False}
    async with case.model.engine(plugins=watched("mtp", record, unchanged), **settings) as running:
        for (tokens, params), answer in zip(work(2), case.answers, strict=False):
            assert await running.tokens(tokens, **params) == answer
    assert sum(drafted.check(case.reference) for drafted in record) > 0.95 * sum(len(drafted.drafts) for drafted in record)


@pytest.mark.parametrize("kind", CONFIGS)
async def test_drafts_past_the_end_of_the_context(tmp_path: Path, kind: str) -> None:
    """With random weights of `load_format: dummy` too there is an MTP layer, if it is asked for."""
    folder = write_tiny_llama(tmp_path, base=CONFIGS[kind])
    model = Harness(folder, **{"model.max_model_len": 48, "speculative.method": "mtp", "speculative.k": 4})
    prompts = [random.Random(i).choices(range(3, 160), k=20 + i) for i in range(3)]
    answers = []
    for method in ("none", "mtp"):
        async with model.engine(**{"speculative.method": method}) as running:
            ids = [running.submit(prompt, max_tokens=48 - len(prompt), ignore_eos=True) for prompt in prompts]
            outputs = [await running.outputs(i) for i in ids]
            answers.append([[t for o in found for t in o.tokens] for found in outputs])
            assert all(found[-1].finish_reason == "length" for found in outputs)
            assert sum(o.drafted for found in outputs for o in found) > 0 or method == "none"
    assert answers[0] == answers[1]


def test_a_model_without_mtp_is_refused(tmp_path: Path) -> None:
    """Before its weights are loaded; and a checkpoint that leaves the layer out, after."""
    with pytest.raises(ConfigError, match="'mtp' cannot be used here: this checkpoint of LlamaForCausalLM has no MTP layer"):
        Harness(write_tiny_llama(tmp_path / "llama"), **{"speculative.method": "mtp"})
    model = Harness(write_tiny_llama(tmp_path / "longcat", base=CONFIGS["longcat"]))
    with pytest.raises(ConfigError, match="this checkpoint of LongcatFlashForCausalLM has no MTP layer"):
        assemble(model.settings(**{"speculative.method": "mtp"}), "tiny", model.loaded, model.plugins)


def test_the_pool_holds_the_draft_layer_only_where_it_drafts(case: Case) -> None:
    spec = case.model.loaded.model.spec
    sizes = {}
    for method in ("none", "pld", "mtp"):
        engine = assemble(case.model.settings(**{"speculative.method": method}), "tiny", case.model.loaded, case.model.plugins)
        engine.executor.close()
        sizes[method] = engine.info.memory["kv_pool"] / (engine.info.kv_tokens + engine.info.page_size)
    value = 4 * (spec.kv.latent_dim + spec.kv.rope_dim)
    assert sizes["none"] == sizes["pld"] == value * spec.kv.layers
    assert sizes["mtp"] == value * (spec.kv.layers + 1) + 4 * spec.hidden_size / 8
