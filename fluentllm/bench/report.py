"""What every benchmark's JSON holds beside its figures: versions, device, command, date, and whether it means anything."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..packages import installed_version


def environment(synthetic: str | None = None) -> dict[str, Any]:
    """`synthetic`: of the engine that was measured (`ModelInfo.synthetic`)."""
    packages = ("fluentllm", "torch", "triton", "transformers", "numpy")
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": " ".join(["fluent", *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **{name: v for name in packages if (v := installed_version(name))}},
        "device": device(),
        "synthetic": synthetic,
    }


def device() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def write(path: Path | None, figures: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n")


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Mean, median, 90 and 99 %; zeros where nothing was measured."""
    if not values:
        return {"mean": 0.0, "p50": 0.0, "p90": 0.0, "p99": 0.0}
    ordered = sorted(values)
    at = {f"p{p}": ordered[min(len(ordered) - 1, int(len(ordered) * p / 100))] for p in (50, 90, 99)}
    return {"mean": statistics.fmean(ordered), **at}


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
