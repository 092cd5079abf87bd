"""The device that an engine runs on: chosen by setting, and refused with the reason where it would not work.

Reads what PyTorch, the driver and the system say of GPUs; nothing is allocated here.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import torch

from .core.errors import ConfigError

LEAST_CAPABILITY = (8, 0)
CAPABILITIES = (
    "9.0 (Hopper: H100, H200, H800, H20): all kernels; "
    "8.0 to 8.9, and 10.0 and up: all but the MLA kernels, which are Hopper's (attention falls back to torch for MLA); "
    "below 8.0: none, since they lack bfloat16"
)
"""What runs on which compute capability."""
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def choose_device(name: str) -> torch.device:
    """`engine.device` → a device that works. Raises `ConfigError` for one that does not, saying why."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"engine.device is {name!r}.", fix="Use auto, cpu, cuda or cuda:N.", param="engine.device")
    if device.type != "cuda":
        return device
    check_gpu(name, device)
    return torch.device("cuda", device.index or 0)  # streams and threads want the number


def check_gpu(name: str, device: torch.device) -> None:
    """Raises `ConfigError` if there is no such GPU, or it cannot run what we have."""
    if not torch.cuda.is_available():
        why, fix = why_no_gpu()
        raise ConfigError(f"engine.device is {name!r}, but {why}.", fix=f"{fix} Or use --device cpu.", param="engine.device")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        there = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise ConfigError(f"engine.device is {name!r}, but there is only {there}.", fix=f"Use {there}.", param="engine.device")
    wrong = wrong_capability(torch.cuda.get_device_capability(device))
    if wrong is not None:
        gpu = torch.cuda.get_device_name(device)
        raise ConfigError(f"{gpu} cannot be used: {wrong}.", fix="Use another GPU, or --device cpu.", param="engine.device")


def wrong_capability(capability: tuple[int, int]) -> str | None:
    """None, or why a GPU of this compute capability cannot be used."""
    number = f"{capability[0]}.{capability[1]}"
    if capability < LEAST_CAPABILITY:
        return f"its compute capability is {number}. What runs where: {CAPABILITIES}"
    built = torch.cuda.get_arch_list()
    if built and not any(_runs(architecture, capability) for architecture in built):
        return f"its compute capability is {number}, and this PyTorch is built for {', '.join(built)}"
    return None


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    """Machine code (sm_86) runs on the same major number and no smaller minor; PTX (compute_90) on everything newer."""
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", architecture)
    if match is None:
        return False
    major, minor = int(match[2]), int(match[3])
    if match[1] == "compute":
        return (major, minor) <= capability
    return major == capability[0] and minor <= capability[1]


def why_no_gpu() -> tuple[str, str]:
    """Where PyTorch sees no GPU: (why, what mends it)."""
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA", "Install a CUDA build of PyTorch: pip install --force-reinstall torch."
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    driver, supports = driver_version(), driver_cuda()
    if driver is None and supports is None:
        return "there is no NVIDIA driver here", "Install one, or, in a container, pass the GPUs in (--gpus all)."
    built = tuple(map(int, torch.version.cuda.split(".")[:2]))
    if supports is not None and supports[0] < built[0]:
        named = f"driver {driver}" if driver else "the NVIDIA driver"
        return (
            f"{named} is too old: it supports CUDA {supports[0]}.{supports[1]}, and this PyTorch is built for CUDA "
            f"{torch.version.cuda}",
            f"Update the driver, or install a PyTorch that is built for CUDA {supports[0]}.",
        )
    if hidden is not None:
        return f"CUDA_VISIBLE_DEVICES is {hidden!r}, which shows PyTorch no GPU", "Unset it."
    return f"PyTorch sees no GPU, though driver {driver or '(of unknown version)'} is there", "See what nvidia-smi says."


def driver_version() -> str | None:
    """Of NVIDIA's kernel module, such as 580.95.05; None without one."""
    try:
        match = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", _DRIVER_FILE.read_text())
    except OSError:
        return None
    return match[1] if match else None


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver supports, asked of its library; None without one."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10
