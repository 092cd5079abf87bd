"""A stop string inside of drafts: the text ends before it, whatever was drafted and however far ahead the engine is."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from api.conftest import TINY, idle, settings_of
from frontend.checkpoints import write_chat_folder

from fluentllm.assembly import build_engine
from fluentllm.core.plugins import PluginManager
from fluentllm.frontend.client import LocalEngineClient
from fluentllm.frontend.sampling import SamplingOptions
from fluentllm.frontend.services import Services
from fluentllm.hub import resolve

from .watching import WatchedPlugin

if TYPE_CHECKING:
    from pathlib import Path

PROMPT = [5, 6, 7, 8, 5, 6]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_chat_folder(tmp_path_factory.mktemp("stops"))
    (folder / "config.json").write_text(json.dumps(TINY))
    return folder


async def completions(folder: Path, plugins: PluginManager, stops: list[str | None], **overrides: Any) -> list[Any]:
    settings = settings_of(folder, {"engine.deterministic": True, **overrides}.items())
    engine = build_engine(settings, resolve(str(folder)), plugins)
    running = asyncio.create_task(engine.run())
    client = LocalEngineClient(engine)
    services = Services.load(settings, client, folder, "tiny")
    found = []
    for stop in stops:
        options = SamplingOptions(max_tokens=40, temperature=0.0, stop=stop, ignore_eos=True)
        found += await services.generation.complete(services.generation.job([PROMPT], options))
    await idle(engine)
    engine.kv.check_idle()
    services.close()
    client.close()
    engine.stop()
    await running
    return found


@pytest.mark.parametrize("depth", [0, 1, 2])
async def test_a_stop_string_inside_a_draft(folder: Path, depth: int) -> None:
    off = PluginManager.load({"engine", "executor"}, allow=[])
    (whole,) = await completions(folder, off, [None])
    answer = [*PROMPT, *whole.tokens]

    def right(history: list[int], own: list[int]) -> list[int]:
        return (answer + [0] * 4)[len(history) : len(history) + 4]

    own = off.registry("proposers").get("pld").factory
    plugins = PluginManager.load({"engine", "executor"}, allow=[], objects={"watched": WatchedPlugin(own, [], right)})
    # Pieces of the text at several places: some end in the middle of a draft, some across two tokens.
    stops: list[str | None] = [whole.text[at : at + 3] for at in range(6, len(whole.text) - 3, 7)][:6]
    expected = await completions(folder, off, stops)
    settings = {"speculative.method": "watched", "speculative.k": 4, "engine.overlap_depth": depth}
    found = await completions(folder, plugins, stops, **settings)
    for stop, one, other in zip(stops, expected, found, strict=True):
        assert stop is not None
        assert one.text == whole.text[: whole.text.index(stop)]
        assert (other.text, other.finish_reason, other.stop) == (one.text, "stop", stop)
    assert sum(completion.accepted for completion in found) > 0
    cut = 0
    for completion in found:
        # The first token comes from the prompt; each verification brings its accepted drafts and one of the target's own.
        verifications = sum(completion.drafts.values())
        assert completion.accepted == completion.new_tokens - 1 - verifications
        assert completion.drafted == 4 * verifications
        cut += completion.drafted - completion.accepted
    assert cut > 0, "some stop string ends inside a draft"
