"""Starts that have compiled all their kernels are remembered; what a kernel may depend on makes another start of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernels.triton.hopper_driver import Hopper
from triton.runtime import driver

from fluentllm.assembly import known_kernels
from fluentllm.assembly.known_kernels import mark_of, remember
from fluentllm.core import config
from fluentllm.core.timeline import Timeline
from fluentllm.kernels.cuda import compile
from fluentllm.kernels.triton.elementwise import silu_mul
from fluentllm.kernels.triton.launch import Launch, recording
from fluentllm.prewarm import Prewarm

DEVICE = torch.device("cuda", 0)
CONFIG = {"hidden_size": 8, "rope_scaling": None}
PLUGINS = {"triton": "fluentllm 1"}


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One that is not here: only its name and number are asked for."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="NVIDIA H100", major=9, minor=0)
    )
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


def mark(given: dict[str, Any] = CONFIG, plugins: dict[str, str] = PLUGINS, **changes: Any) -> Path:
    return mark_of(config.load(None, changes, {}).settings, given, DEVICE, plugins)


def test_the_same_start_has_the_same_mark(tmp_path: Path) -> None:
    assert mark() == mark()
    assert mark().parent == tmp_path / "triton", "gone with the kernels"
    assert mark(**{"server.port": 9000, "log.level": "debug"}) == mark()


def test_what_kernels_depend_on_changes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = [
        mark(),
        mark({**CONFIG, "hidden_size": 16}),
        mark(plugins={"triton": "fluentllm 2"}),
        mark(**{"kv.dtype": "fp8"}),
        mark(**{"speculative.method": "pld"}),
        mark(**{"scheduler.max_running": 3}),
    ]
    monkeypatch.setattr(torch, "__version__", "9.9")
    marks.append(mark())
    monkeypatch.setattr(compile, "compiler_version", lambda: (99, 1))
    marks.append(mark())
    monkeypatch.undo()
    assert len(set(marks)) == len(marks)


@pytest.mark.parametrize("name", ["norm.py", "product.cu", "hopper.cuh"])
def test_a_changed_source_changes_it(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "kernels").mkdir(parents=True)
    source = package / "kernels" / name
    source.write_text("one")
    monkeypatch.setattr(known_kernels, "PACKAGE", package)
    before = mark()
    source.write_text("another")
    assert mark() != before


@pytest.mark.parametrize("fails", ["nothing", "listing", "a kernel"])
def test_a_start_is_remembered_if_all_was_compiled(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_active", Hopper())
    with recording() as launches:
        silu_mul(torch.empty(1, 64, dtype=torch.bfloat16, device="meta"))
    if fails == "a kernel":
        launches = [replace(launch, options={**launch.options, "BLOCK": 3}) for launch in launches]  # no power of two

    def steps() -> Iterator[list[Launch]]:
        yield launches
        if fails == "listing":
            raise RuntimeError("an operation is not known on meta")

    place = mark()
    prewarm = Prewarm()
    prewarm.start(steps, torch.device("cpu"), Timeline("engine"), lambda: remember(place))
    prewarm.wait()
    assert place.exists() == (fails == "nothing")


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    remember(tmp_path / "file" / "mark")
