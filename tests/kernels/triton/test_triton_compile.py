"""Every Triton kernel compiles for Hopper, in the configurations that its launcher asks for. Needs no GPU."""

from __future__ import annotations

import importlib
import pkgutil
import re

import pytest
import triton

import fluentllm.kernels.triton as room
from fluentllm.kernels.cuda.launch import CudaKernel
from fluentllm.kernels.triton.compile import OPTIONS, compile_launch, specialise
from fluentllm.kernels.triton.examples import EXAMPLES, example_launches
from fluentllm.kernels.triton.launch import START_NEXT, Launch, launch, recording

HOPPER_SHARED_BYTES = 227 * 1024


def triton_launches() -> list[Launch]:
    return [one for _, one in example_launches() if isinstance(one.kernel, triton.JITFunction)]


def test_every_kernel_has_an_example() -> None:
    kernels = set()
    for module in pkgutil.iter_modules(room.__path__, room.__name__ + "."):
        members = vars(importlib.import_module(module.name))
        kernels |= {k.__module__ + "." + k.__name__ for k in members.values() if isinstance(k, triton.JITFunction)}
    launched = {one.kernel.__module__ + "." + one.kernel.__name__ for one in triton_launches()}
    assert {name for name in kernels if name.endswith("_kernel")} == launched


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.__name__)
def test_compiles_for_hopper(example) -> None:
    with recording() as launches:
        example()
    seen = {}
    for one in launches:
        if isinstance(one.kernel, CudaKernel):
            continue  # test_cuda_compile.py
        options = {name: value for name, value in one.options.items() if name in OPTIONS}
        seen[one.kernel.__name__, repr(specialise(one)), repr(options)] = one
    for one in seen.values():
        compiled = compile_launch(one)
        assert "cubin" in compiled.asm
        assert compiled.metadata.shared <= HOPPER_SHARED_BYTES, (one.kernel.__name__, one.options)


def test_every_programmatic_kernel_starts_the_next_at_any_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in START_NEXT:
        monkeypatch.setitem(START_NEXT, place, 2)
    one_each = {one.kernel.__name__: one for one in triton_launches() if one.options.get("PDL")}
    assert len(one_each) > 15
    for name, one in one_each.items():
        assert one.options["PDL"] == 2
        assert "griddepcontrol.launch_dependents" in compile_launch(one).asm["ptx"], name


def test_the_routers_sums_are_promoted_at_every_step() -> None:
    """A compiler may add up what a product gives inside of the product: tensor cores would cut long sums off."""
    wide = [one for one in triton_launches() if one.kernel.__name__ == "_wide_scores_kernel"]
    for one in wide:
        code = compile_launch(one).asm["ttgir"]
        dots = [at.start() for at in re.finditer(r"warp_group_dot ", code)]
        assert len(dots) == 3
        assert "arith.addf" in code[dots[-1] : code.index("scf.yield", dots[-1])]
    assert wide


def test_the_check_sees_what_would_not_compile() -> None:
    with recording() as launches:
        launch(triton.jit(_broken), (1,), 3)
    with pytest.raises(triton.CompilationError):
        compile_launch(launches[0])


def test_a_recorded_launch_must_be_complete() -> None:
    with pytest.raises(TypeError, match="without"):
        specialise(Launch(triton.jit(_broken), (1,), (), {}))


def _broken(x):
    return x.no_such_member
