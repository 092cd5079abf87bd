"""A third party's plugin, installed by pip: listed, configured, run as command, as route, as scheduling policy."""

from __future__ import annotations

import asyncio
import json
import random

import pytest
from engine.harness import Harness, write_tiny_llama
from processes.server import Server

from fluentllm.core.config import bind
from fluentllm.core.plugins import PluginManager

pytestmark = pytest.mark.usefixtures("third_party_plugin")

ALLOWED = {"FLUENT_PLUGINS": "shortest_first"}


def test_it_is_listed(fluent):
    rows = {row["name"]: row for row in json.loads(fluent("plugins", "list", "--json", **ALLOWED).stdout)}
    row = rows["shortest_first"]
    assert (row["state"], row["source"], row["version"], row["builtin"]) == ("loaded", "fluent-shortest-first", "0.3.0", False)
    assert row["processes"] == ["engine", "frontend", "cli"]
    assert row["hooks"] == ["fluent_commands", "fluent_config", "fluent_routes", "fluent_schedulers"]
    assert rows["scheduler_fcfs"]["builtin"] is True


def test_it_shows_what_it_offers(fluent):
    row = json.loads(fluent("plugins", "show", "shortest-first", "--json", **ALLOWED).stdout)
    assert row["offers"] == {"schedulers": ["shortest_first"], "routes": ["GET /shortest_first"]}
    assert row["settings"] == ["plugins.shortest_first.patience (int ≥ 0)"]


def test_it_is_in_order(fluent):
    assert "All plugins are in order." in fluent("plugins", "doctor", **ALLOWED).stdout


def test_its_command_runs(fluent_process):
    assert "shortest-first" in fluent_process("--help", **ALLOWED).stdout
    lines = fluent_process("shortest-first", "900", "20", "300", **ALLOWED).stdout.splitlines()
    assert lines == ["1. prompt 2 of 20 tokens", "2. prompt 3 of 300 tokens", "3. prompt 1 of 900 tokens"]


def test_without_being_allowed_it_is_not_there(fluent):
    assert "shortest-first" not in fluent("--help").stdout
    assert "No such command" in fluent("shortest-first", "1", code=2).stderr
    rows = json.loads(fluent("plugins", "list", "--json").stdout)
    (row,) = [row for row in rows if row["name"] == "shortest_first"]
    assert (row["state"], row["problem"], row["file"]) == ("excluded", "not on the allow list", None)


def test_its_settings_are_in_the_tree(fluent):
    environ = {**ALLOWED, "FLUENT_PLUGINS__SHORTEST_FIRST__PATIENCE": "7"}
    (row,) = json.loads(fluent("config", "explain", "plugins.shortest_first.patience", "--json", **environ).stdout)
    assert (row["value"], row["default"], row["unit"]) == (7, 64, "requests")
    assert row["origin"] == "environment variable FLUENT_PLUGINS__SHORTEST_FIRST__PATIENCE"
    schema = json.loads(fluent("config", "schema", **ALLOWED).stdout)
    assert schema["$defs"]["ShortestFirstSettings"]["properties"]["patience"]["minimum"] == 0
    bad = fluent("config", "show", "--set", "plugins.shortest_first.patience=-1", code=2, **ALLOWED)
    assert "error: command line, --set plugins.shortest_first.patience: plugins.shortest_first.patience is '-1'" in bad.stderr


# -------------------------------------------------------------------------------------------------------------- the policy
class WithThirdParty(Harness):
    def __init__(self, folder, **overrides) -> None:
        super().__init__(folder, **overrides)
        self.plugins = PluginManager.load({"engine", "executor"}, allow=["shortest_first"])

    def settings(self, **overrides):
        return bind(super().settings(**overrides), self.plugins.config_structs())


@pytest.fixture(scope="module")
def harness(third_party_plugin, tmp_path_factory) -> WithThirdParty:
    return WithThirdParty(write_tiny_llama(tmp_path_factory.mktemp("tiny")))


async def order_of(harness, lengths, **overrides) -> list[int]:
    """In which order prompts of these lengths finish when one runs at a time."""
    one_at_a_time = {"scheduler.max_running": 1, "scheduler.policy": "shortest_first", **overrides}
    async with harness.engine(**one_at_a_time) as engine:
        ids = [engine.submit(list(range(3, 3 + length)), max_tokens=2, ignore_eos=True) for length in lengths]
        queues = {request_id: engine.outputs(request_id) for request_id in ids}
        finished: list[int] = []

        async def wait(index, outputs):
            await outputs
            finished.append(index)

        await asyncio.gather(*(wait(index, queues[request_id]) for index, request_id in enumerate(ids)))
        return finished


async def test_the_shortest_prompt_runs_first(harness):
    assert await order_of(harness, [40, 10, 30, 20]) == [1, 3, 2, 0]
    assert await order_of(harness, [40, 10, 30, 20], **{"scheduler.policy": "fcfs"}) == [0, 1, 2, 3]


async def test_patience_ends(harness):
    assert await order_of(harness, [40, 10, 30, 20], **{"plugins.shortest_first.patience": 0}) == [0, 1, 2, 3]
    assert await order_of(harness, [40, 10, 30, 20], **{"plugins.shortest_first.patience": 2}) == [1, 3, 0, 2]


@pytest.mark.parametrize("depth", [0, 1, 2])
async def test_the_policy_changes_who_runs_and_no_token(harness, depth):
    """Ragged prompts, few pages, chunked prefill, a cancelled request: the same tokens as the built-in policy gives."""
    draw = random.Random(depth)
    prompts = [[draw.randrange(3, 160) for _ in range(draw.choice([1, 5, 17, 60, 150]))] for _ in range(12)]
    lengths = [draw.randrange(1, 20) for _ in prompts]
    found = {}
    for policy in ("fcfs", "shortest_first"):
        tight = {"scheduler.max_running": 4, "scheduler.prefill_tokens": 32, "engine.overlap_depth": depth}
        async with harness.engine(**tight, **{"scheduler.policy": policy, "model.max_model_len": 256}) as engine:
            cancelled = engine.submit(prompts[3], max_tokens=50)
            ids = [engine.submit(p, max_tokens=n, ignore_eos=True) for p, n in zip(prompts, lengths, strict=True)]
            found[policy] = [await engine.rest(ids[0])]
            engine.connection.abort([cancelled])
            found[policy] += [await engine.rest(request_id) for request_id in ids[1:]]
    assert [len(tokens) for tokens in found["fcfs"]] == lengths
    assert found["shortest_first"] == found["fcfs"]


# --------------------------------------------------------------------------------------------------------------- the server
def test_a_server_with_the_plugin(tmp_path):
    chosen = (
        "--scheduler",
        "shortest_first",
        "--set",
        "plugins.allow=shortest_first",
        "--set",
        "plugins.shortest_first.patience=5",
    )
    server = Server(tmp_path / "tiny", *chosen, temporary=tmp_path)
    try:
        assert server.complete(max_tokens=4).json()["usage"]["completion_tokens"] == 4
        answer = server.client.get("/shortest_first").json()
        assert answer == {"policy": "shortest_first", "patience": 5, "waiting": 0, "running": 0}
    finally:
        server.end()
