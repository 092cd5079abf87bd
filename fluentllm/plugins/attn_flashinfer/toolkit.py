"""What FlashInfer's sources are compiled with, and where it lies: nvcc, ninja, headers, the driver's library to link with."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from fluentllm.hub.cache import kernel_folder


def find_compiler() -> Path | None:
    """nvcc, where FlashInfer looks for it; None without it or ninja."""
    ninja = shutil.which("ninja", path=search_path())
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = Path(home, "bin", "nvcc") if home else Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    return found if ninja and found.is_file() else None


def environment() -> dict[str, str]:
    """Additions to the environment of who compiles."""
    compiler = find_compiler()
    found = {"PATH": search_path()}
    if compiler is None:
        return found
    # Behind what FlashInfer names itself: only what a toolkit without all of its headers lacks.
    found["CPLUS_INCLUDE_PATH"] = _joined("CPLUS_INCLUDE_PATH", _headers())
    if not any((compiler.parents[1] / folder / "libcuda.so").exists() for folder in ("lib64/stubs", "lib64")):
        found["LIBRARY_PATH"] = _joined("LIBRARY_PATH", _driver_folder())
    return {name: value for name, value in found.items() if value}


def search_path() -> str:
    """`PATH`, and behind it the folder of this Python: FlashInfer calls ninja by name, and pip may have put it there."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])


def _joined(variable: str, more: list[Path]) -> str:
    return os.pathsep.join(filter(None, [os.environ.get(variable, ""), *map(str, more)]))


def _headers() -> list[Path]:
    """Of CUDA's libraries (curand and others), as PyTorch's requirements bring them."""
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    return [found for folder in folders for found in sorted(Path(folder).glob("*/include")) if found.is_dir()]


def _driver_folder() -> list[Path]:
    """A folder with a `libcuda.so`, which drivers often leave out where a program is only to be run."""
    library = _driver_library()
    if library is None:
        return []
    folder = kernel_folder() / "driver"
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "libcuda.so"
    if not link.exists():
        link.unlink(missing_ok=True)
        link.symlink_to(library)
    return [folder]


def _driver_library() -> Path | None:
    """`libcuda.so.1`, as the loader would find it."""
    name = ctypes.util.find_library("cuda")
    if name is None:
        return None
    try:
        known = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    lines = [line.split("=>") for line in known.splitlines() if name in line and "=>" in line]
    return Path(lines[0][1].strip()) if lines else None
