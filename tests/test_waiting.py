"""Threads of an engine that wait for each other give up their core soon, unless the user says how they wait."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fluentllm.waiting import SPINS

NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
SCRIPT = """
import os, sys
from fluentllm import LLM
from fluentllm.core.errors import FluentError
assert "torch" not in sys.modules
try:
    LLM("/none")
except FluentError:
    print(os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("given", "spins"), [({}, SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_an_engine_says_how_its_threads_wait_before_torch_is_there(given: dict[str, str], spins: str) -> None:
    environ = {name: value for name, value in os.environ.items() if name not in NAMES} | given
    found = subprocess.run([sys.executable, "-c", SCRIPT], env=environ, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == spins


COMMAND = """
import sys
from fluentllm import cli, waiting
waiting.spin_briefly = lambda: print("torch" in sys.modules)
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize("command", [("bench", "latency"), ("bench", "throughput"), ("bench", "step"), ("chat",)], ids=" ".join)
def test_commands_with_an_engine_do_not_load_torch_before_it(command: tuple[str, ...]) -> None:
    found = subprocess.run([sys.executable, "-c", COMMAND, *command, "/none"], capture_output=True, text=True, check=False)
    assert found.stdout.strip() == "False", found.stderr
