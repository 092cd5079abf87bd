"""From a `.cu` file here to machine code: NVRTC, once for each set of options, kept in Triton's cache folder.

No GPU is needed, so tests compile every kernel on any machine.
"""

from __future__ import annotations

import hashlib
import os
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from triton import knobs

HOPPER = "sm_90a"
_FLAGS = ("--std=c++20",)
_FOLDER = Path(__file__).parent


@cache
def compiler_version() -> tuple[int, int] | None:
    """Of NVRTC; None where it, or its Python package `cuda-bindings`, is missing."""
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return None
    from cuda.bindings import nvrtc

    try:
        _, major, minor = nvrtc.nvrtcVersion()
    except Exception:  # what it raises where it finds no library has changed between versions
        return None
    return major, minor


def compiled(name: str, options: tuple[tuple[str, str | int], ...] = (), architecture: str = HOPPER) -> bytes:
    """The machine code of `name`.cu with these macros defined. Raises RuntimeError with the compiler's text."""
    source = (_FOLDER / f"{name}.cu").read_text()
    headers = _headers(source, {})
    flags = [*_FLAGS, f"--gpu-architecture={architecture}", *(f"-D{macro}={value}" for macro, value in options)]
    text = "\0".join([repr(compiler_version()), *flags, source, *headers.values()])
    kept = Path(knobs.cache.dir) / "cuda" / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.cubin"
    if kept.is_file():
        return kept.read_bytes()
    code = _compile(name, source, headers, flags)
    kept.parent.mkdir(parents=True, exist_ok=True)
    whole = kept.with_suffix(f".{os.getpid()}.tmp")
    whole.write_bytes(code)
    whole.replace(kept)
    return code


def _headers(source: str, found: dict[str, str]) -> dict[str, str]:
    """What `source` includes, and what that does, by name."""
    for name in re.findall(r'#include "(\w+\.cuh)"', source):
        if name not in found:
            found[name] = (_FOLDER / name).read_text()
            _headers(found[name], found)
    return found


def _compile(name: str, source: str, headers: dict[str, str], flags: list[str]) -> bytes:
    from cuda.bindings import nvrtc

    texts = [text.encode() for text in headers.values()]
    names = [header.encode() for header in headers]
    error, program = nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), len(names), texts, names)
    _check(error)
    try:
        (error,) = nvrtc.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise RuntimeError(f"{name}.cu does not compile with {' '.join(flags)}:\n{_log(program)}")
        error, size = nvrtc.nvrtcGetCUBINSize(program)
        _check(error)
        code = bytearray(size)
        # The buffer is written through its pointer.
        _check(*nvrtc.nvrtcGetCUBIN(program, code))
        return bytes(code)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _log(program: object) -> str:
    from cuda.bindings import nvrtc

    error, size = nvrtc.nvrtcGetProgramLogSize(program)
    _check(error)
    text = bytearray(size)
    _check(*nvrtc.nvrtcGetProgramLog(program, text))
    return bytes(text).rstrip(b"\0").decode(errors="replace")


def _check(error: object) -> None:
    if error:
        raise RuntimeError(f"NVRTC: {error}")
