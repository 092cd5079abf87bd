"""A real engine with a plugin that hangs: the process says where, and ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fluentllm.processes.control import EXIT_HANG

SCRIPT = """
import asyncio, ctypes, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from processes.tiny_engine import build
from fluentllm.core.hookspecs import hookimpl
from fluentllm.frontend.client import LocalEngineClient
from fluentllm.core.types import Request, SamplingParams
from fluentllm.processes import watchdog

class Stuck:
    slow = False
    nap = 0.0

    @hookimpl
    def fluent_step(self, plan, result):
        if self.slow:
            {hang}
        time.sleep(0.01)

    @hookimpl
    def fluent_request(self, event):
        if event.kind == "queued":
            time.sleep(self.nap)

async def complete(client, tokens):
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    return [output async for output in client.submit(Request(id="r", prompt=[5, 6], params=params))]

async def main():
    stuck = Stuck()
    engine, plugins = build(Path({folder!r}), {{"stuck": stuck}})
    watchdog.GRACE = 0.5
    dog = watchdog.Watchdog(engine, 1.0, plugins.ledger)
    running = asyncio.create_task(engine.run())
    client = LocalEngineClient(engine)
    dog.start()
    await complete(client, 130)  # an engine that is busy for long is left alone,
    await asyncio.sleep(1.3)  # and so is an idle one,
    stuck.nap = 0.6
    await complete(client, 1)  # and one that was idle and now is slow
    print("finished", flush=True)
    stuck.slow = True
    await complete(client, 5)

asyncio.run(main())
"""


def run(folder: Path, hang: str) -> subprocess.CompletedProcess[str]:
    tests = str(Path(__file__).parents[1])
    script = SCRIPT.format(tests=tests, hang=hang, folder=str(folder))
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)


def test_a_plugin_that_hangs_is_named(tiny):
    ended = run(tiny, "time.sleep(60)")
    assert ended.stdout == "finished\n", ended.stderr
    assert ended.returncode == EXIT_HANG
    assert "The engine hangs: no step was finished for" in ended.stderr
    assert "with 1 requests running" in ended.stderr
    assert "plugin 'stuck' has been in fluent_step for" in ended.stderr
    assert "thread 'MainThread' is in Stuck.fluent_step (<string>:" in ended.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs sleep(3)")
def test_a_hang_that_keeps_pythons_lock_ends_the_process_too(tiny):
    ended = run(tiny, "ctypes.PyDLL(None).sleep(60)")
    assert ended.stdout == "finished\n", ended.stderr
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr
    assert "in fluent_step" in ended.stderr


PROPOSER = """
import asyncio, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from processes.tiny_engine import build
from speculation.proposers import Plugin
from fluentllm.frontend.client import LocalEngineClient
from fluentllm.core.types import Request, SamplingParams
from fluentllm.processes import watchdog

def waits_for_ever(*arguments):
    time.sleep(60)

async def main():
    settings = {{"speculative.method": "test", "speculative.k": 2}}
    engine, plugins = build(Path({folder!r}), {{"stuck": Plugin(waits_for_ever)}}, **settings)
    running = asyncio.create_task(engine.run())
    watchdog.Watchdog(engine, 1.0, plugins.ledger).start()
    request = Request(id="r", prompt=[5, 6], params=SamplingParams(max_tokens=5))
    return [output async for output in LocalEngineClient(engine).submit(request)]

asyncio.run(main())
"""


def test_a_proposer_that_hangs_is_named(tiny):
    script = PROPOSER.format(tests=str(Path(__file__).parents[1]), folder=str(tiny))
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == EXIT_HANG, ended.stderr
    assert "The engine hangs: no step was finished for" in ended.stderr
    assert "thread 'fluent-launch_0' is in waits_for_ever (<string>:" in ended.stderr
