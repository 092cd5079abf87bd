"""What was measured of attention backends, kept on disk: one small file for each GPU, software and shape of attention."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from typing import TYPE_CHECKING

import msgspec
import torch

from ...core.protocols import Phase
from ...devices import driver_version
from ...hub.cache import kernel_folder
from ...packages import installed_version

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ...core.plugins.registry import Entry
    from ...core.protocols import AttentionSpec

log = logging.getLogger(__name__)

PACKAGES = ("fluentllm", "torch", "triton", "flashinfer-python")
"""Kernels come from these."""

Times = dict[str, dict[str, float]]
"""Point, such as `32 × 1024`, → backend → microseconds a layer."""


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """Of the backends that could run one phase then."""

    of: dict[str, str]
    """What it holds for; see `facts`."""
    phase: Phase
    taken: str
    """Date and time, UTC."""
    backends: list[str]
    """That took part, sorted."""
    times: Times

    def order(self) -> list[str]:
        """The fastest first: by the geometric mean, over the points, of time / best time. Points that some backend has no time
        at do not count."""
        whole = [row for row in self.times.values() if all(name in row for name in self.backends)]
        scores = dict.fromkeys(self.backends, 1.0)
        for row in whole:
            best = min(row.values())
            for name in self.backends:
                scores[name] *= row[name] / best
        return sorted(self.backends, key=lambda name: (scores[name], name))

    def described(self) -> str:
        """`1 × 1024: flashinfer 5.2 µs, triton 6.0; …`."""
        points = []
        for point, row in self.times.items():
            each = ", ".join(f"{name} {micros:.3g}" for name, micros in sorted(row.items(), key=lambda item: item[1]))
            points.append(f"{point}: {each} µs")
        return "; ".join(points)


def facts(spec: AttentionSpec, entries: Sequence[Entry], device: torch.device, longest: int) -> dict[str, str]:
    """What a measurement depends on. `longest`: tokens of the longest sequence."""
    kv = spec.model.kv
    shape = [
        kv.kind,
        spec.model.heads,
        kv.heads,
        kv.head_dim,
        kv.v_head_dim,
        kv.latent_dim,
        kv.rope_dim,
        kv.nope_dim,
        kv.value_dim,
    ]
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": driver_version() or "unknown",
        "cuda": torch.version.cuda or "none",
        **{package: installed_version(package) or "none" for package in PACKAGES},
        "backends": ", ".join(sorted(f"{entry.name} of {entry.source}" for entry in entries)),
        "attention": " ".join(map(str, shape)),
        "types": f"{spec.dtype} over {spec.kv_dtype}",
        "page_size": str(spec.page_size),
        "longest": str(longest),
    }


def recall(of: dict[str, str], phase: Phase) -> Measurement | None:
    """The measurement of just this, if there is one that can be read."""
    try:
        found = msgspec.json.decode(_file(of, phase).read_bytes(), type=Measurement)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        log.info("a measurement of attention backends cannot be read: %s", error)
        return None
    return found if found.of == of and found.phase == phase else None


def keep(measurement: Measurement) -> None:
    """A folder that cannot be written costs the next start a new measurement, and nothing else."""
    path = _file(measurement.of, measurement.phase)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(measurement), indent=2))
        temporary.replace(path)
    except OSError as error:
        log.info("the measurement of attention backends is not kept: %s", error)


def _file(of: dict[str, str], phase: Phase) -> Path:
    digest = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]
    return kernel_folder() / "attention" / f"{phase}-{digest}.json"
