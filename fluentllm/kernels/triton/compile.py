"""Compiling recorded launches ahead of time, without a GPU: what tests can check on any machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

if TYPE_CHECKING:
    from .launch import Launch

HOPPER = GPUTarget("cuda", 90, 32)
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "launch_pdl", "enable_fp_fusion")
_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


def compile_launch(launch: Launch, target: GPUTarget = HOPPER) -> Any:
    """The compiled kernel (`.asm`, `.metadata`) that this launch would run, specialised as Triton's own launcher does:
    integers by 1 and by divisibility by 16, pointers taken as aligned. Raises what Triton raises."""
    signature, constants, attributes = specialise(launch)
    options = {name: value for name, value in launch.options.items() if name in OPTIONS}
    kind = GluonASTSource if isinstance(launch.kernel, GluonJITFunction) else ASTSource
    source = kind(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options)


def specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """(type of each parameter, its value where it is a constant, its divisibility)."""
    names = launch.kernel.arg_names
    given = dict(zip(names, launch.args, strict=False))
    given.update({name: value for name, value in launch.options.items() if name not in OPTIONS})
    missing = [name for name in names if name not in given]
    if missing:
        raise TypeError(f"{launch.kernel.__name__} is launched without {missing}")
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, (name, parameter) in enumerate(zip(names, launch.kernel.params, strict=True)):
        value = given[name]
        one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _type(value)
        aligned = isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0)
        if aligned and not parameter.do_not_specialize:
            attributes[index,] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_POINTERS[value.base.dtype][1:]}[{','.join(map(str, value.block_shape))}]>"
    if isinstance(value, GluonDescriptor):
        return f"tensordesc<{_POINTERS[value.base.dtype][1:]}[{','.join(map(str, value.block_shape))}],{value.layout!r}>"
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"a kernel takes tensors, descriptors, numbers and None, not {type(value).__name__}")
