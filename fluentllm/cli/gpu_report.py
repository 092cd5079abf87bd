"""What `fluent doctor` says of GPUs: devices, driver, compilers, kernel caches; and what is wrong where none is seen."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import typer

from ..packages import installed_version
from . import output


def examine() -> dict[str, Any]:
    """Ready for JSON. Allocates nothing on a GPU."""
    import torch

    from fluentllm import devices

    supports = devices.driver_cuda()
    report: dict[str, Any] = {
        "driver": devices.driver_version(),
        "driver_supports_cuda": ".".join(map(str, supports)) if supports else None,
        "torch_built_for_cuda": torch.version.cuda,
        "why_none": None,
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
        "capabilities": devices.CAPABILITIES,
        "triton": installed_version("triton"),
        "nvcc": _nvcc(),
        "nvrtc": _nvrtc(),
        "flashinfer": _flashinfer(),
        "kernel_cache": _kernel_cache(),
    }
    if not report["gpus"]:
        why, fix = devices.why_no_gpu()
        report["why_none"], report["fix"] = why, fix
    return report


def problems(report: dict[str, Any]) -> list[dict[str, str]]:
    """What a user would want mended: a GPU that is there and cannot be used."""
    found = []
    if report["why_none"] and report["driver"]:
        found.append({"problem": f"No GPU can be used: {report['why_none']}.", "fix": report["fix"]})
    for gpu in report["gpus"]:
        if gpu["cannot_be_used"]:
            found.append({"problem": f"{gpu['name']} cannot be used: {gpu['cannot_be_used']}.", "fix": "Use another GPU."})
    return found


def _gpu(index: int) -> dict[str, Any]:
    import torch

    from fluentllm import devices

    about = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = (about.major, about.minor)
    return {
        "name": about.name,
        "capability": f"{about.major}.{about.minor}",
        "multiprocessors": about.multi_processor_count,
        "free_bytes": free,
        "total_bytes": total,
        "cannot_be_used": devices.wrong_capability(capability),
    }


def _nvcc() -> str | None:
    """Version of the CUDA compiler, which FlashInfer needs; None without one."""
    home = os.environ.get("CUDA_HOME")
    path = shutil.which("nvcc") or (f"{home}/bin/nvcc" if home and Path(home, "bin", "nvcc").is_file() else None)
    if path is None:
        return None
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return f"{path}, which does not run"
    return next((line.split("release ")[1].split(",")[0] for line in said.splitlines() if "release " in line), path)


def _nvrtc() -> str | None:
    """Version of the compiler of `kernels/cuda`; None without it or `cuda-bindings`."""
    from fluentllm.kernels.cuda.compile import compiler_version

    version = compiler_version()
    return ".".join(map(str, version)) if version else None


def _flashinfer() -> dict[str, Any]:
    """Is it installed, and which of its kernels are compiled already?"""
    version = installed_version("flashinfer-python")
    base = Path(os.environ.get("FLASHINFER_WORKSPACE_BASE", str(Path.home()))) / ".cache" / "flashinfer"
    compiled = sorted({file.stem for file in base.glob("**/*.so")}) if version else []
    return {"version": version, "compiled": compiled, "folder": str(base)}


def _kernel_cache() -> dict[str, Any]:
    """Where kernels are kept that the GPU runs, and how much there is."""
    from fluentllm.hub.cache import kernel_folder

    folder = Path(os.environ.get("TRITON_CACHE_DIR") or kernel_folder() / "triton")
    files = [file for file in folder.glob("**/*") if file.is_file()] if folder.is_dir() else []
    return {
        "folder": str(folder),
        "bytes": sum(file.stat().st_size for file in files),
        "kernels": sum(file.suffix == ".cubin" for file in files),
    }


def print_report(report: dict[str, Any]) -> None:
    gib = 2**30
    rows = [
        (f"gpu {index}", f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['multiprocessors']} multiprocessors, "
         f"{gpu['free_bytes'] / gib:.1f} of {gpu['total_bytes'] / gib:.1f} GiB free")
        for index, gpu in enumerate(report["gpus"])
    ] or [("gpus", f"none: {report['why_none']}")]  # fmt: skip
    driver = report["driver"] or "none"
    if report["driver_supports_cuda"]:
        driver += f", supports CUDA {report['driver_supports_cuda']}"
    cache, flashinfer = report["kernel_cache"], report["flashinfer"]
    rows += [
        ("driver", driver),
        ("cuda of torch", report["torch_built_for_cuda"] or "none: built without CUDA"),
        ("triton", report["triton"] or "not installed"),
        ("nvcc", report["nvcc"] or "not found"),
        ("nvrtc", report["nvrtc"] or "not found: slower products of few rows on Hopper; pip install cuda-bindings"),
        ("flashinfer", f"{flashinfer['version']}, {len(flashinfer['compiled'])} modules compiled in {flashinfer['folder']}"
         if flashinfer["version"] else "not installed"),
        ("kernel cache", f"{cache['folder']}: {cache['kernels']} kernels, {cache['bytes'] / 2**20:.0f} MiB"),
    ]  # fmt: skip
    typer.echo("\ngpu")
    output.print_table(("", ""), rows)
