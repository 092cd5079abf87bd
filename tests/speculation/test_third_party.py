"""A third party's proposer, installed by pip: listed, configured, served with; no token changes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from engine.harness import Harness, write_tiny_llama
from processes.server import Server
from typer.testing import CliRunner

from fluentllm.cli import create_app
from fluentllm.core.config import bind
from fluentllm.core.errors import ConfigError
from fluentllm.core.plugins import PluginManager

if TYPE_CHECKING:
    from pathlib import Path

    from fluentllm.core.types import SpeculativeStats

pytestmark = pytest.mark.usefixtures("third_party_proposer")

LOOP = {"logit_bias": {9: 100.0, 12: 99.0}, "presence_penalty": 2.0, "frequency_penalty": 2.0}
"""Two tokens by turns, whatever the model says: pairs that a proposer can learn."""


class WithThirdParty(Harness):
    def __init__(self, folder: Path, **overrides: Any) -> None:
        super().__init__(folder, **overrides)
        self.plugins = PluginManager.load({"engine", "executor"}, allow=["bigram"])

    def settings(self, **overrides: Any) -> Any:
        return bind(super().settings(**overrides), self.plugins.config_structs())


@pytest.fixture(scope="module")
def model(third_party_proposer: str, tmp_path_factory: pytest.TempPathFactory) -> WithThirdParty:
    settings: dict[str, Any] = {"engine.deterministic": True, "speculative.k": 3, "speculative.min_acceptance": 0.0}
    return WithThirdParty(write_tiny_llama(tmp_path_factory.mktemp("bigram")), **settings)


def test_it_is_listed_with_what_it_offers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUENT_PLUGINS", "bigram")
    shown = CliRunner().invoke(create_app(), ["plugins", "show", "bigram", "--json"])
    row = json.loads(shown.output)
    assert (row["state"], row["source"], row["version"], row["builtin"]) == ("loaded", "fluent-bigram", "0.2.0", False)
    assert row["offers"] == {"proposers": ["bigram"]}
    assert row["settings"] == ["plugins.bigram.least (int ≥ 1)"]
    assert "All plugins are in order." in CliRunner().invoke(create_app(), ["plugins", "doctor"]).output


async def answers(model: WithThirdParty, **settings: Any) -> tuple[list[list[int]], SpeculativeStats | None]:
    """Of several requests at once, greedy and sampled, twice; and what the proposer brought."""
    given: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True}
    async with model.engine(**settings) as running:
        found = []
        for _ in range(2):
            ids = [
                running.submit([5, 6, 7 + i % 3], temperature=0.8 * (i % 2), seed=i, **given, **(LOOP if i > 3 else {}))
                for i in range(6)
            ]
            found += [await running.rest(i) for i in ids]
        return found, running.engine.stats().speculative


@pytest.mark.parametrize("depth", [0, 1, 2])
async def test_no_token_changes(model: WithThirdParty, depth: int) -> None:
    expected, _ = await answers(model, **{"speculative.method": "none"})
    found, stats = await answers(model, **{"speculative.method": "bigram", "engine.overlap_depth": depth})
    assert found == expected
    assert stats is not None
    assert stats.error is None
    assert stats.info.method == "bigram"
    assert 0 < sum(stats.accepted) < sum(stats.drafted)


async def test_its_setting_says_what_it_drafts(model: WithThirdParty) -> None:
    """A pair that must come more often is drafted less often."""
    drafted = []
    for least in (1, 3, 1000):
        _, stats = await answers(model, **{"speculative.method": "bigram", "plugins.bigram.least": least})
        assert stats is not None
        drafted.append(sum(stats.drafted))
    assert drafted[0] > drafted[1] > drafted[2] == 0


async def test_what_it_does_not_support_is_refused_in_its_words(model: WithThirdParty, monkeypatch: pytest.MonkeyPatch) -> None:
    import fluent_bigram

    monkeypatch.setattr(fluent_bigram, "MOST_TOKENS", 100)
    with pytest.raises(ConfigError, match="its vocabulary has more than 100 tokens"):
        async with model.engine(**{"speculative.method": "bigram"}):
            pass


def test_a_server_with_it(tmp_path: Path) -> None:
    """As a user serves with it: all processes load it from its metadata."""
    chosen = ("--speculative=bigram", "--set=plugins.allow=bigram", "--set=plugins.bigram.least=2", "--deterministic")
    asked: dict[str, Any] = {"max_tokens": 40, "prompt": "abcabcabc", "logit_bias": {"65": 100}}
    found = []
    for arguments in (("--set=speculative.k=3", *chosen), ("--deterministic",)):
        server = Server(tmp_path / "tiny", *arguments, temporary=tmp_path)
        try:
            found.append(server.complete(**asked).json())
            assert ("bigram, 3 a step" in server.output) == (arguments[0] != "--deterministic")
        finally:
            server.end()
    drafted, plain = found
    assert drafted["choices"][0]["text"] == plain["choices"][0]["text"]
    details = drafted["usage"]["completion_tokens_details"]
    assert details["proposer"] == "bigram"
    assert details["accepted_prediction_tokens"] > 20
    assert "completion_tokens_details" not in plain["usage"]
