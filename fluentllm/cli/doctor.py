"""`fluent doctor`: what is installed, which device there is, what would be used here and why, and what is wrong."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..packages import installed_version
from . import gpu_report, options, output

if TYPE_CHECKING:
    import torch

    from fluentllm.core.plugins import PluginManager
    from fluentllm.core.settings import Settings
    from fluentllm.core.types import ModelSpec

EXIT_PROBLEMS = 1


def register(root: typer.Typer) -> None:
    root.command()(doctor)


def doctor(
    model: options.Model = None, config: options.Config = None, sets: options.Sets = None, json: output.Json = False
) -> None:
    """What is installed, what device, what would be used and why. Touches no network. Exits with 1 if something is wrong."""
    report = examine({"model.name": model}, config, sets)
    if json:
        output.print_json(report)
    else:
        _print(report)
    if report["problems"]:
        raise typer.Exit(EXIT_PROBLEMS)


def examine(overrides: dict[str, Any], config: Path | None = None, sets: list[str] | None = None) -> dict[str, Any]:
    """All of the report, ready for JSON."""
    from fluentllm.core.errors import FluentError
    from fluentllm.core.plugins import PluginManager

    from .plugins import find_problems

    settings = options.load(config, overrides, sets).settings
    problems = list(find_problems(config, sets))
    report: dict[str, Any] = {
        "system": _system(),
        "packages": _packages(),
        "device": _device(),
        "gpu": gpu_report.examine(),
        "model": {},
        "choices": [],
    }
    problems += gpu_report.problems(report["gpu"])
    try:
        plugins = PluginManager.load({"engine", "executor", "cli"}, settings.plugins.allow, settings.plugins.deny, strict=False)
        report["choices"] = _choices(settings, plugins)
        spec, report["model"] = _model(settings, plugins)
        if spec is not None:
            report["choices"] += _model_choices(settings, plugins, spec)
            _check_pool(settings, plugins, spec, Path(report["model"]["path"]))
    except FluentError as error:
        problems.append({"problem": error.message, "fix": error.fix or "See the message."})
    return {**report, "problems": [dict(row) for row in {tuple(problem.items()): None for problem in problems}]}


def _system() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_available_bytes": _available_memory(),
    }


def _available_memory() -> int | None:
    try:
        line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return None  # not Linux


def _packages() -> list[dict[str, Any]]:
    """Versions of what FluentLLM's own metadata asks for. `for`: the extra that brings it, where it is optional."""
    rows = []
    for requirement in ["fluentllm", *(metadata.requires("fluentllm") or [])]:
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
        extra = re.search(r"extra == ['\"]([^'\"]+)['\"]", requirement)
        if extra and (extra[1] in ("dev", "test") or name == "fluentllm"):
            continue
        rows.append({"name": name, "version": installed_version(name), "for": extra[1] if extra else None})
    return rows


def _device() -> dict[str, Any]:
    import torch

    return {"cpu": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}


def _choices(settings: Settings, plugins: PluginManager) -> list[dict[str, str]]:
    """What the settings come to on this device, whatever the model."""
    from fluentllm.assembly import choose_device, choose_dtype
    from fluentllm.kernels import choose_precision

    device = choose_device(settings.engine.device)
    dtype = choose_dtype(settings.model.dtype, device)
    precision = choose_precision(settings.model.weight_precision, device, dtype, settings.engine.deterministic)
    there = "there is a GPU" if device.type == "cuda" else "there is no GPU"
    plugins.registry("schedulers").get(settings.scheduler.policy)
    return [
        _choice("engine.device", settings.engine.device, str(device), there),
        _choice("model.dtype", settings.model.dtype, str(dtype).removeprefix("torch."), f"the default on {device.type}"),
        _choice("model.weight_precision", settings.model.weight_precision, precision, f"the default on {device.type}"),
        _kernels(settings, device),
        _choice("scheduler.policy", settings.scheduler.policy, settings.scheduler.policy, ""),
        _grammars(plugins),
    ]


def _grammars(plugins: PluginManager) -> dict[str, str]:
    """Kinds of grammars that requests may have. What a plugin says of a model it says when the model is loaded."""
    registry = plugins.registry("grammars")
    usable = [entry.name for entry in registry.supported(None)]
    reasons = dict.fromkeys(registry.why_not(None).values())
    because = "; ".join(reasons) or ("" if usable else "no plugin compiles any")
    return {"setting": "grammars", "set_to": "", "uses": ", ".join(usable) or "none", "because": because}


def _kernels(settings: Settings, device: torch.device) -> dict[str, str]:
    """C kernels or torch's operations. Compiles the kernels, if they can be had and were not yet."""
    from fluentllm.assembly import wants_library
    from fluentllm.hub.cache import cache_folder
    from fluentllm.kernels.native.library import NotAvailable, find_compiler, load

    try:
        if wants_library(settings, device):
            load(cache_folder() / "kernels")
            uses, why = "C kernels", f"compiled by {find_compiler()}"
        else:
            uses = "torch's operations" if device.type == "cpu" else "GPU kernels"
            why = "as set" if not settings.engine.native else "C kernels are for a CPU, and not for deterministic mode"
    except NotAvailable as reason:
        uses, why = "torch's operations", str(reason).splitlines()[0]
    return {"setting": "engine.native", "set_to": str(settings.engine.native).lower(), "uses": uses, "because": why}


def _model(settings: Settings, plugins: PluginManager) -> tuple[ModelSpec | None, dict[str, Any]]:
    """The model, if it is on this disk, and who runs it."""
    from fluentllm.hub import check_name, load_config, resolve
    from fluentllm.hub.config import architecture
    from fluentllm.hub.describe import known_models

    name = settings.model.name
    here = Path(name).expanduser().exists() or any(known.name == name and known.cached for known in known_models())
    if not here:
        check_name(name)
        return None, {"name": name, "state": f"not on this disk; `fluent models pull {name}` fetches it"}
    files = resolve(name, settings.model.revision, weights=False)
    config = load_config(files)
    entry = plugins.registry("models").get(architecture(config))
    about = {"name": name, "state": "on this disk", "path": str(files.path), "architecture": entry.name, "plugin": entry.plugin}
    registry = plugins.registry("weights")
    readers = [reader.name for reader in registry.supported(files.path)]
    return entry.factory.spec(config), {**about, "readers": readers, "not_readers": registry.why_not(files.path)}


def _model_choices(settings: Settings, plugins: PluginManager, spec: ModelSpec) -> list[dict[str, str]]:
    from dataclasses import replace

    from fluentllm.assembly import choose_device, choose_dtype, choose_kv_dtype, choose_page_size
    from fluentllm.assembly.attention import asked_for, described
    from fluentllm.assembly.choices import max_model_len
    from fluentllm.core.kv.formats import token_bytes
    from fluentllm.core.protocols import AttentionSpec

    device = choose_device(settings.engine.device)
    dtype = choose_dtype(settings.model.dtype, device)
    kv_dtype = str(choose_kv_dtype(settings, dtype)).removeprefix("torch.")
    attention_spec = AttentionSpec(
        model=spec,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        kv_dtype=kv_dtype,
        page_size=choose_page_size(settings, spec),
        deterministic=settings.engine.deterministic,
    )
    registry, longest = plugins.registry("attention"), max_model_len(settings, spec)
    size = token_bytes(spec.kv, kv_dtype) * spec.kv.layers
    rows = [_choice("kv.dtype", settings.kv.dtype, kv_dtype, f"{size:,} bytes a token", always=True)]
    for phase, (used, why) in described(settings, attention_spec, plugins, device, longest).items():
        asked = replace(attention_spec, phases=(phase,))
        usable = ", ".join(entry.name for entry in registry.supported(asked))
        against = [f"not {name}: {reason}" for name, reason in registry.why_not(asked).items()]
        setting = "attention.backend" if phase == "decode" else "attention.prefill_backend"
        _, wanted = asked_for(settings.attention, phase)
        reasons = "; ".join(filter(None, [why, f"can serve this model in {phase}: {usable}", *against]))
        rows.append({"setting": setting, "set_to": wanted, "uses": used, "because": reasons})
    return rows


def _check_pool(settings: Settings, plugins: PluginManager, spec: ModelSpec, path: Path) -> None:
    """Raises `OutOfMemory` for a `kv.memory` that does not hold one context, on a CPU for one that is not free too. What fits
    without it only the start knows."""
    from fluentllm.assembly import choose_device, choose_dtype, choose_kv_dtype, choose_page_size
    from fluentllm.assembly.choices import DEFAULT_SLOTS, draft_length, max_model_len
    from fluentllm.assembly.proposers import choose_proposer
    from fluentllm.assembly.step import page_bytes
    from fluentllm.core.protocols import DraftMemory, DraftTarget
    from fluentllm.core.slots import pages_of
    from fluentllm.memory import PoolShape, Room, plan_pages, room_on_cpu

    if settings.kv.memory is None:
        return
    device = choose_device(settings.engine.device)
    dtype, page_size = choose_dtype(settings.model.dtype, device), choose_page_size(settings, spec)
    lengths, proposer = draft_length(settings), choose_proposer(settings, spec, plugins)
    own = proposer.memory(DraftTarget(settings, spec, dtype.itemsize, path)) if proposer is not None else DraftMemory()
    size = page_bytes(spec.kv, own, page_size, choose_kv_dtype(settings, dtype))
    drafts = lengths.max_k if lengths is not None else 0
    least = pages_of(max_model_len(settings, spec), drafts, page_size)
    slots = settings.scheduler.max_running or DEFAULT_SLOTS.get(device.type, 64)
    room = room_on_cpu(device) if device.type == "cpu" else Room(sys.maxsize)
    plan_pages(settings.kv.memory, room, PoolShape(size, page_size, wanted=slots * least, least=least, drafts=drafts))


def _choice(setting: str, wanted: str, chosen: str, reason: str, always: bool = False) -> dict[str, str]:
    """`reason` is why `auto` chose it; it says more than "you asked for it" only then, or where it always does."""
    asked = wanted != "auto"
    why = "; ".join(filter(None, ["as set" if asked else "", reason if always or not asked else ""]))
    return {"setting": setting, "set_to": wanted, "uses": chosen, "because": why}


def _print(report: dict[str, Any]) -> None:
    device = report["device"]
    rows = [(key.replace("_", " "), output.text(value)) for key, value in report["system"].items()]
    rows.append(("cpu", f"{device['cpu']}, {device['threads']} threads"))
    output.print_table(("", ""), rows)
    gpu_report.print_report(report["gpu"])
    typer.echo("\npackages")
    packages = [(row["name"], row["version"] or "not installed", _needed(row)) for row in report["packages"]]
    output.print_table(("", "", ""), packages)
    typer.echo("\nmodel")
    output.print_table(("", ""), [(key.replace("_", " "), output.text(value)) for key, value in report["model"].items()])
    typer.echo("\nwhat would be used")
    output.print_table(("", "", ""), [(row["setting"], row["uses"], row["because"]) for row in report["choices"]])
    typer.echo("")
    for problem in report["problems"]:
        typer.echo(f"error: {problem['problem']}\nfix: {problem['fix']}")
    if not report["problems"]:
        typer.echo("No problem found.")


def _needed(row: dict[str, Any]) -> str:
    return f"optional: pip install 'fluentllm[{row['for']}]'" if row["for"] and row["version"] is None else ""
