"""Launches of a kind that was launched before: the same as Triton's own, and never of another kind."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from fluentllm.kernels.triton.examples import example_launches
from fluentllm.kernels.triton.launch import launch
from fluentllm.kernels.triton.relaunch import _kinds, key_of


def _any(a, b, c, plain, unaligned, first: tl.constexpr, second: tl.constexpr):
    pass


KERNEL = JITFunction(_any, do_not_specialize=["plain"], do_not_specialize_on_alignment=["unaligned"])
BINDER = create_function_from_signature(KERNEL.signature, KERNEL.params, make_backend(GPUTarget("cuda", 90, 32)))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)
NUMBERS = (0, 1, -1, 2, 15, 16, -16, 17, 2**31 - 16, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**40 + 1, 2**63 - 1, -(2**63))
OPTIONS = (0, 1, 2, 16, True, False, None, "a", "1", "None", tl.float32, tl.bfloat16)
SIZES = ([16, 16], [16, 32], [32, 16])


def tensor(rng: random.Random) -> Tensor:
    base = torch.zeros(64, dtype=rng.choice(DTYPES))
    return base[rng.choice((0, 1, 16)) :]


def box(rng: random.Random) -> TensorDescriptor:
    base = torch.zeros(64, 64, dtype=rng.choice((torch.float32, torch.bfloat16)))
    return TensorDescriptor(base, [64, 64], [64, 1], rng.choice(SIZES), rng.choice(("zero", "nan")))


def gluon_box(rng: random.Random) -> GluonDescriptor:
    base = torch.zeros(64, 64, dtype=rng.choice((torch.float32, torch.bfloat16)))
    layout = NVMMASharedLayout(rng.choice((64, 128)), 8 * base.element_size(), 2, rng.choice((True, False)))
    return GluonDescriptor(base, [64, 64], [64, 1], rng.choice(([16, 64], [32, 64])), layout, rng.choice(("zero", "nan")))


def argument(rng: random.Random) -> Any:
    kinds = [tensor, box, gluon_box, lambda r: r.choice(NUMBERS), lambda r: r.choice((True, False)),
             lambda r: r.choice((0.0, 1.0, -2.5)), lambda r: None]  # fmt: skip
    return rng.choice(kinds)(rng)


def triton_key(args: tuple[Any, ...], options: dict[str, Any]) -> str:
    """What `JITFunction.run` keeps compiled kernels by."""
    _, specialisation, rest = BINDER(*args, **options)
    return str(specialisation) + str(rest)


def test_what_triton_compiles_apart_is_never_launched_as_one() -> None:
    """Many random launches around one, each with one or two arguments changed, so that keys do meet."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    compiled: dict[Any, str] = {}
    met = 0
    for _ in range(60):
        first = [argument(rng) for _ in range(5)]
        chosen: dict[str, Any] = {"first": rng.choice(OPTIONS), "second": rng.choice(OPTIONS), "num_warps": 4}
        for _ in range(120):
            args, options = list(first), dict(chosen)
            for _ in range(rng.randint(0, 2)):
                args[rng.randrange(5)] = argument(rng)
            options[rng.choice(("first", "second"))] = rng.choice(OPTIONS)
            options["num_warps"] = rng.choice((4, 8))
            if rng.random() < 0.2:
                options["launch_pdl"] = rng.choice((True, False))
            key = key_of(list(args), options)
            assert key is not None
            wanted = triton_key(tuple(args), options)
            met += key in compiled
            assert compiled.setdefault(key, wanted) == wanted, (args, options)
    assert met > 500


def test_other_values_of_a_kind_are_launched_as_one() -> None:
    options = {"first": 64, "second": True, "num_warps": 4}
    one = key_of([torch.zeros(16), 32, 7, 1, 2.5], options)
    assert one == key_of([torch.zeros(99), 48, 9, 1, -1.0], dict(options))
    assert one != key_of([torch.zeros(99)[1:], 48, 9, 1, -1.0], options)


@pytest.mark.parametrize("value", [2**63, [1], (1, 2), object(), torch.float32])
def test_what_it_does_not_know_is_left_to_triton(value: Any) -> None:
    assert key_of([value], {}) is None


@pytest.mark.parametrize("value", [1.0, -0.0, [1], (1, True), tl.pointer_type(tl.int8), _any])
def test_constants_whose_values_may_be_equal_and_compile_apart_are_too(value: Any) -> None:
    assert key_of((), {"first": value}) is None


def test_every_kernel_here_has_a_key() -> None:
    launches = [one for _, one in example_launches() if isinstance(one.kernel, JITFunction)]
    without = {one.kernel.__name__ for one in launches if key_of(list(one.args), one.options) is None}
    assert not without


STAND_IN = """
    import json, types
    import torch, triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    launched = []

    class Launcher:  # where Triton hands a launch to the driver
        def __init__(self, source, metadata):
            self.name = source.fn.__name__

        def __call__(self, *given):
            metadata, hooks = given[6], given[7:9]
            values = [a if isinstance(a, (int, float, str, type(None))) else id(a) for a in given[9:]]
            launched.append((self.name, given[:6], values))
            for hook in hooks:
                if hook is not None:
                    hook(metadata)

    class Hopper:  # what Triton asks of a driver
        launcher_cls = Launcher
        utils = types.SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            load_binary=lambda name, *rest: (object(), hash(name), 32, 0, 1024),
            unload_module=lambda module: None,
        )
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 7)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

    driver.set_active(Hopper())
    from fluentllm.kernels.triton import relaunch
    from fluentllm.kernels.triton.examples import products_of_few_rows, small_operations
    from fluentllm.kernels.triton.launch import launch, recording

    with recording() as launches:
        small_operations()
        products_of_few_rows()
    ours = [one for one in launches if isinstance(one.kernel, triton.JITFunction)]
    launches = [one for one in ours if 0 not in one.grid][::3]

    def again():
        launched.clear()
        for one in launches:
            launch(one.kernel, one.grid, *one.args, **one.options)
        return list(launched)

    runs = []
    real = triton.JITFunction.run
    def count(self, *args, **options):
        runs.append(self)
        return real(self, *args, **options)
    triton.JITFunction.run = count

    first = again()
    kinds = len(runs)
    assert len(first) == len(launches)
    assert kinds == len(relaunch._kinds) > 10, (kinds, len(relaunch._kinds))
    assert again() == first
    assert len(runs) == kinds, "a kind that was launched before went through Triton"

    seen = []
    triton.knobs.runtime.launch_enter_hook.add(lambda metadata: seen.append(metadata.get()["name"]))
    assert again() == first
    assert len(seen) == len(launches) and len(runs) == kinds + len(launches)
    triton.knobs.runtime.launch_enter_hook.calls.clear()
    triton.knobs.runtime.launch_exit_hook = lambda metadata: seen.append("exit")
    assert again() == first
    assert len(seen) == 2 * len(launches) and len(runs) == kinds + 2 * len(launches)
    triton.knobs.runtime.launch_exit_hook = None
    with recording() as kept:
        assert again() == []
    assert len(kept) == len(launches)
    with recording(run=True) as kept:
        assert again() == first
    assert len(kept) == len(launches) and len(runs) == kinds + 2 * len(launches)
    print("all the same")
"""


def test_a_driver_gets_what_triton_would_have_given_it(tmp_path: Path) -> None:
    """The device alone is stood in for: kernels are compiled, and launched by Triton first, by what it compiled then."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    code = textwrap.dedent(STAND_IN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout == "all the same\n", done.stdout + done.stderr


def _double(out, x, count, size: tl.constexpr):
    i = tl.program_id(0) * size + tl.arange(0, size)
    tl.store(out + i, 2 * tl.load(x + i, mask=i < count), mask=i < count)


@pytest.mark.gpu
def test_on_a_gpu_the_second_launch_computes_the_same() -> None:
    """Other sizes, pointers that are and are not aligned, on another stream, captured."""
    kernel = triton.jit(_double)
    stream = torch.cuda.Stream()
    before = len(_kinds)
    for round in range(2):
        for count in (0, 1, 5, 16, 1000, 4096):
            for first in (0, 1):
                x = torch.randn(count + first, device="cuda")[first:]
                out = torch.zeros_like(x)
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    launch(kernel, (triton.cdiv(count, 256),), out, x, count, size=256)
                torch.cuda.current_stream().wait_stream(stream)
                assert torch.equal(out, 2 * x), (round, count, first)
    assert before < len(_kinds) <= before + 8
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        launch(kernel, (1,), torch.zeros(16), torch.zeros(16), 16, size=256)
    x, out = torch.randn(512, device="cuda"), torch.zeros(512, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(kernel, (2,), out, x, 512, size=256)
    x.normal_()
    graph.replay()
    assert torch.equal(out, 2 * x)
