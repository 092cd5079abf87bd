"""C kernels for a step of few rows on an x86 CPU, compiled for this machine when they are first wanted.

torch's own operations serve everywhere; these are faster where a C compiler is found. The library is kept in the cache folder
under a name made of sources, flags, compiler and CPU, so that it is made once. It uses the OpenMP that torch has loaded, and
with it torch's pool of threads: two pools on one set of cores would slow each other down.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_SOURCES = ("products.c", "byte_products.c", "rows.c", "vectors.h")
# Sums may be taken in any order, as vectors want it; infinities and NaN stay what they are. Not -ffast-math: linked into a
# library, it changes how the whole process rounds.
_FLAGS = (
    *("-std=gnu11", "-O3", "-fPIC", "-fopenmp"),
    *("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"),
)
_NEEDED = frozenset(("avx2", "fma", "f16c"))

_LONG, _FLOAT, _POINTER = ctypes.c_long, ctypes.c_float, ctypes.c_void_p

Function = Callable[..., int | None]
"""Takes addresses of tensors and sizes, as its C text says."""


class DecodeShape(ctypes.Structure):
    """`Shape` of rows.c."""

    _fields_ = (
        *((name, _LONG) for name in ("sequences", "queries", "heads", "kv_heads", "size")),
        *((name, _LONG) for name in ("q_stride", "k_stride", "v_stride", "page_size", "page_stride", "first_key")),
        ("scale", _FLOAT),
    )


class Library:
    """The functions of one compiled library."""

    def __init__(self, path: Path) -> None:
        """Raises `OSError`, `AttributeError` if a function is not in it, and `ValueError` if a value is not."""
        # What takes long lets other Python threads run; for what takes microseconds that costs more than it gives.
        long, short = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
        product = (*(_POINTER,) * 4, *(_LONG,) * 3)
        self.multiplies_bytes = bool(ctypes.c_int.in_dll(long, "fluent_multiplies_bytes").value)
        """Do products of tiles round activations to 16 bits (byte_products.c)? Else they are float32's (products.c)."""
        self.product4 = _function(long, "fluent_product4", *product)
        self.product8 = _function(long, "fluent_product8", *product)
        self.decode_attention = _function(long, "fluent_decode_attention", *(_POINTER,) * 10, result=ctypes.c_int)
        self.rms_norm = _function(short, "fluent_rms_norm", *(_POINTER,) * 4, _LONG, _LONG, _FLOAT)
        self.silu_mul = _function(short, "fluent_silu_mul", _POINTER, _POINTER, _LONG, _LONG)
        self.rotary = _function(short, "fluent_rotary", *(_POINTER,) * 4, *(_LONG,) * 4)


def _function(library: ctypes.CDLL, name: str, *arguments: Any, result: Any = None) -> Function:
    function = getattr(library, name)
    function.argtypes, function.restype = arguments, result
    return function  # type: ignore[no-any-return]


class NotAvailable(Exception):
    """The C kernels cannot be had here; says why."""


@cache
def load(folder: Path, target: str = "native") -> Library:
    """The library, compiled into `folder` unless it is there. `target`: the compiler's `-march`, for tests of what other CPUs
    get. Raises `NotAvailable`."""
    cpu = _cpu()
    compiler = find_compiler()
    openmp = _openmp_of_torch()
    here = Path(__file__).parent
    sources = {name: (here / name).read_bytes() for name in _SOURCES}
    version = _run([compiler, "--version"])
    flags = (*_FLAGS, f"-march={target}")
    key = hashlib.sha256("\0".join((*flags, version, cpu)).encode())
    for text in sources.values():
        key.update(text)
    path = folder / f"kernels-{key.hexdigest()[:24]}.so"
    try:
        if not path.exists():
            _compile([compiler, *flags], here, path)
    except OSError as error:
        raise NotAvailable(f"{folder} cannot be written: {error}") from None
    # Global, so that the library finds in it what its own `-fopenmp` left open.
    ctypes.CDLL(openmp, ctypes.RTLD_GLOBAL)
    try:
        return Library(path)
    except (OSError, AttributeError, ValueError) as error:
        raise NotAvailable(f"{path} cannot be loaded: {error}") from None


def find_compiler() -> str:
    """Path of the C compiler: `CC`, else cc, gcc or clang. Raises `NotAvailable`."""
    wanted = os.environ.get("CC", "").split()
    for name in (*wanted[:1], "cc", "gcc", "clang"):
        found = shutil.which(name)
        if found:
            return found
    raise NotAvailable("no C compiler was found (cc, gcc or clang; `CC` names another)")


def _cpu() -> str:
    """What the compiler's `native` depends on. Raises `NotAvailable` where the kernels were not written for it."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise NotAvailable(f"the C kernels are for Linux on x86-64, and this is {sys.platform} on {platform.machine()}")
    flags = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            flags = line.partition(":")[2]
            break
    missing = sorted(_NEEDED - set(flags.split()))
    if missing:
        raise NotAvailable(f"the CPU lacks {', '.join(missing)}")
    return flags


def _openmp_of_torch() -> str:
    """Path of the OpenMP runtime that this process has loaded."""
    import torch  # noqa: F401  (loads it)

    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith(("libgomp", "libiomp5", "libomp")):
            return path
    raise NotAvailable("torch was built without OpenMP")


def _compile(command: list[str], here: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects = []
        for source in (name for name in _SOURCES if name.endswith(".c")):
            objects.append(str(Path(folder, source).with_suffix(".o")))
            _run([*command, "-c", str(here / source), "-o", objects[-1]])
        # Without -fopenmp, which would bring a runtime of its own.
        library = Path(folder, path.name)
        _run([command[0], "-shared", "-o", str(library), *objects, "-lm"])
        library.replace(path)
    log.info("compiled the C kernels for this CPU in %.1f s", time.perf_counter() - started)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotAvailable(f"{command[0]} cannot be run: {error}") from None
    if done.returncode:
        raise NotAvailable(f"{' '.join(command)} failed:\n{done.stderr.strip()[-2000:]}")
    return done.stdout
