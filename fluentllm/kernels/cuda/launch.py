"""A kernel of a `.cu` file, launched like Triton's: `kernel[grid](*arguments, **options)`, so that one door (`triton.launch`)
makes, records and compiles ahead launches of both kinds.

Options in capitals are macros that the file is compiled with; `cluster` (unless the file says it), `threads`, `shared` (bytes)
and `launch_pdl` say how it is launched.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .compile import compiled

if TYPE_CHECKING:
    from collections.abc import Callable


class Boxes(NamedTuple):
    """A tensor that TMA reads in boxes: for a parameter of type `TensorMap`."""

    base: torch.Tensor
    """Its last dimension contiguous."""
    box: tuple[int, ...]
    swizzled: bool = True
    """By 128 bytes, which is then how long a row of a box must be."""


MAP = Boxes
POINTER, INT, LONG, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong, ctypes.c_float
SHARED_BYTES = 227 * 1024
"""Of a program, at most."""


class CudaKernel:
    """The kernel `name` of `name`.cu. `types` of its parameters: of those above."""

    def __init__(self, name: str, types: tuple[type, ...]) -> None:
        self.__name__ = name
        self.params = types
        self._loaded: dict[tuple[Any, ...], _Loaded] = {}

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), (self.__name__, self.params)  # what has been loaded belongs to this process

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self._run(grid, arguments, options)

    def warmup(self, *_: Any, grid: tuple[int, ...], **options: Any) -> bytes:
        """The machine code that a launch would run; needs no GPU."""
        return compiled(self.__name__, self.macros(options))

    @staticmethod
    def macros(options: dict[str, Any]) -> tuple[tuple[str, str | int], ...]:
        """What the file is compiled with."""
        found = sorted((name, value) for name, value in options.items() if name.isupper())
        return tuple((name, int(value) if isinstance(value, bool) else value) for name, value in found)

    def _run(self, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        device = torch.cuda.current_device()
        key = (device, *options.items())
        loaded = self._loaded.get(key)
        if loaded is None:
            loaded = self._loaded[key] = _Loaded(self.__name__, self.warmup(grid=grid, **options), options)
        values = [_value(kind, argument) for kind, argument in zip(self.params, arguments, strict=True)]
        loaded.launch(grid, values, torch.cuda.current_stream(device).cuda_stream)


class _Loaded:
    """One kind of launch of a kernel on one device."""

    def __init__(self, name: str, code: bytes, options: dict[str, Any]) -> None:
        from cuda.bindings import driver

        self.library = _checked(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
        kernel = _checked(driver.cuLibraryGetKernel(self.library, name.encode()))
        self.function = _checked(driver.cuKernelGetFunction(kernel))
        shared = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(self.function, shared, options["shared"]))
        self.config = driver.CUlaunchConfig()
        self.config.blockDimX, self.config.blockDimY, self.config.blockDimZ = options["threads"], 1, 1
        self.config.sharedMemBytes = options["shared"]
        attributes = []
        if "cluster" in options:
            cluster = driver.CUlaunchAttribute()
            cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            cluster.value.clusterDim.x, cluster.value.clusterDim.y, cluster.value.clusterDim.z = options["cluster"], 1, 1
            attributes.append(cluster)
        if options.get("launch_pdl"):
            early = driver.CUlaunchAttribute()
            early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            early.value.programmaticStreamSerializationAllowed = 1
            attributes.append(early)
        self.config.attrs, self.config.numAttrs = attributes, len(attributes)

    def launch(self, grid: tuple[int, ...], values: list[Any], stream: int) -> None:
        from cuda.bindings import driver

        x, y, z = (*grid, 1, 1)[:3]
        self.config.gridDimX, self.config.gridDimY, self.config.gridDimZ = x, y, z
        self.config.hStream = stream
        addresses = (ctypes.c_void_p * len(values))(*map(_address, values))
        _checked(driver.cuLaunchKernelEx(self.config, self.function, ctypes.addressof(addresses), 0))


def _value(kind: type, argument: Any) -> Any:
    """What a parameter is given, in memory of its own."""
    if kind is MAP:
        base = argument.base
        shape, strides = tuple(base.shape), tuple(base.stride())
        return tensor_map(base.data_ptr(), base.dtype, shape, strides, argument.box, swizzled=argument.swizzled)
    if kind is POINTER:
        return kind(None if argument is None else argument.data_ptr())
    return kind(argument)


def _address(value: Any) -> int:
    return ctypes.addressof(value) if isinstance(value, ctypes._SimpleCData) else value.getPtr()


@lru_cache(maxsize=4096)
def tensor_map(
    address: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    *,
    swizzled: bool = True,
) -> Any:  # fmt: skip
    """What TMA reads a box of this tensor by. Outside of the tensor there are zeros. Raises RuntimeError where it cannot."""
    from cuda.bindings import driver

    types = driver.CUtensorMapDataType
    kind = {1: types.CU_TENSOR_MAP_DATA_TYPE_UINT8, 2: types.CU_TENSOR_MAP_DATA_TYPE_UINT16,
            4: types.CU_TENSOR_MAP_DATA_TYPE_FLOAT32}[dtype.itemsize]  # fmt: skip
    swizzle = driver.CUtensorMapSwizzle
    return _checked(driver.cuTensorMapEncodeTiled(
        kind, len(shape), address,
        [driver.cuuint64_t(size) for size in reversed(shape)],
        [driver.cuuint64_t(stride * dtype.itemsize) for stride in reversed(strides[:-1])],
        [driver.cuuint32_t(size) for size in reversed(box)],
        [driver.cuuint32_t(1)] * len(shape),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle.CU_TENSOR_MAP_SWIZZLE_128B if swizzled else swizzle.CU_TENSOR_MAP_SWIZZLE_NONE,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    ))  # fmt: skip


def _checked(found: tuple[Any, ...]) -> Any:
    error, *values = found
    if error:
        from cuda.bindings import driver

        _, text = driver.cuGetErrorString(error)
        raise RuntimeError(f"the CUDA driver: {text.decode() if text else error}")
    return values[0] if values else None
