"""Kernels compiled by other processes: a launch in this one finds them in Triton's cache, and what fails is named."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
import triton
from kernels.triton.hopper_driver import Hopper
from triton.runtime import driver

from fluentllm.kernels.cuda.compile import compiled, compiler_version
from fluentllm.kernels.cuda.launch import CudaKernel
from fluentllm.kernels.triton.compilers import Compilers
from fluentllm.kernels.triton.examples import example_launches
from fluentllm.kernels.triton.launch import Launch, compile_ahead
from fluentllm.prewarm import key_of


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(driver, "_active", Hopper())
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def compile_all(launches: list[Launch], processes: int = 2) -> dict[int, str]:
    """What went wrong, by number."""
    found: dict[int, str] = {}
    with Compilers(Hopper.get_current_target(), processes, found.__setitem__) as compilers:
        for number, one in enumerate(launches):
            compilers.compile(number, one)
    assert len(found) == len(launches)
    return found


def test_a_launch_finds_what_they_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch of each of some kernels, descriptors for TMA, Gluon and an address that is not aligned among them."""
    each = {one.kernel.__name__: one for _, one in example_launches()}
    wanted = ["_rms_norm_kernel", "_hopper_linear_kernel", "_stream_kernel", "_draw_kernel", "decode_bf16", "_silu_mul_kernel"]
    launches = [each[name] for name in wanted if name in each]
    assert len(launches) >= 5
    gate = each["_silu_mul_kernel"]
    moved = [v[..., 1:] if isinstance(v, torch.Tensor) and v.data_ptr() % 16 == 0 else v for v in gate.args]
    launches.append(Launch(gate.kernel, gate.grid, tuple(moved), gate.options))
    assert key_of(launches[-1]) != key_of(gate)
    assert set(compile_all(launches).values()) == {""}
    hits: list[bool] = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **about: hits.append(about["cache_hit"]))
    for one in launches:
        one.kernel.device_caches.clear()
        compile_ahead(one)
    assert hits == [True] * len(launches)


@pytest.mark.skipif(compiler_version() is None, reason="NVRTC is not installed")
def test_of_cuda_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, options = next((one.kernel, one.options) for _, one in example_launches() if isinstance(one.kernel, CudaKernel))
    assert compile_all([Launch(kernel, (1,), (), options)]) == {0: ""}
    monkeypatch.setattr("fluentllm.kernels.cuda.compile._compile", lambda *_: pytest.fail("it was not found"))
    assert compiled(kernel.__name__, kernel.macros(options))


BROKEN = """
import os, signal

class Kernel:
    __module__ = __name__
    params = ()
    def __init__(self, name, act):
        self.__name__, self.warmup = name, lambda *args, grid, **options: act()
    def __reduce__(self):
        return self.__name__

def fail():
    raise RuntimeError("no registers\\nleft")

failing = Kernel("failing", fail)
killed = Kernel("killed", lambda: os.kill(os.getpid(), signal.SIGKILL))
leaving = Kernel("leaving", lambda: exit(3))
"""


def test_what_fails_is_named_and_the_others_are_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that only this process's path leads to, as a plugin's may be."""
    (tmp_path / "broken_kernels.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(str(tmp_path))
    import broken_kernels

    last = list(islice((one for _, one in example_launches()), 1))
    own = triton.jit(_inner())
    broken = [broken_kernels.failing, broken_kernels.killed, broken_kernels.leaving]
    odd = Launch(broken_kernels.failing, (1,), (lambda: None,), {})
    found = compile_all([Launch(kernel, (1,), (), {}) for kernel in (*broken, own)] + last + [odd], processes=1)
    assert found[0] == "RuntimeError: no registers left"
    assert found[1] == "its process ended with -9"
    assert found[2] == "SystemExit: 3"
    assert found[3].startswith("PicklingError"), "no name leads to it"
    assert found[4] == ""
    assert "lambda" in found[5], "an argument that no other process can have"


def _inner():
    def inner(x):
        pass

    return inner


def test_a_process_that_cannot_start_says_so_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = [one for _, one in islice(example_launches(), 3)]
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert compile_all(launches) == dict.fromkeys(range(3), "the compiling process ended with 1")


def test_what_is_left_by_an_error_compiles_no_more() -> None:
    launches = [one for _, one in islice(example_launches(), 3)]
    found: dict[int, str] = {}

    def fails() -> None:
        with Compilers(Hopper.get_current_target(), 1, found.__setitem__) as compilers:
            for number, one in enumerate(launches):
                compilers.compile(number, one)
            raise RuntimeError("loading failed")

    with pytest.raises(RuntimeError, match="loading failed"):
        fails()
    assert set(found.values()) == {"the compiling process ended with -9"}
    assert len(found) == 3
