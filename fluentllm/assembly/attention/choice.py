"""Which backends attend, and in which order each phase asks them: those that were named, or the fastest here.

`auto` compares what can run now, on this GPU and this model's shape, and keeps the result (`records`), so that the next start
need not. What is still being compiled takes no part: prefill is compared again when it is there, decode at the next start.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

from ...core.errors import ConfigError
from ...core.protocols import PHASES, AttentionBackend, AttentionContext, PartialAttention
from . import records
from .passes import Order, phased, until_sure
from .timing import able, compare, points

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from ...core.kv.pool import KVPool
    from ...core.plugins import PluginManager
    from ...core.plugins.registry import Entry
    from ...core.protocols import AttentionSpec, Phase
    from ...core.settings import AttentionSettings, Settings

log = logging.getLogger(__name__)

PLAIN = "torch"
"""Serves every pass of every model, slowly: it takes no part where another can."""
FIRST = "triton"
"""Where nothing was measured."""


def asked_for(settings: AttentionSettings, phase: Phase) -> tuple[str, str]:
    """Setting, its value."""
    if phase == "prefill" and settings.prefill_backend is not None:
        return "attention.prefill_backend", settings.prefill_backend
    return "attention.backend", settings.backend


def candidates(
    settings: Settings, spec: AttentionSpec, plugins: PluginManager, phase: Phase, *, or_any: bool = False
) -> list[Entry]:
    """The one that was named, then those that would do what it leaves; or all, in the order that holds without a measurement.
    `or_any`: where the one that was named cannot do it, take the others. Raises `ConfigError`."""
    spec = replace(spec, phases=(phase,))
    registry = plugins.registry("attention")
    found = sorted(registry.supported(spec), key=lambda entry: (entry.name == PLAIN, entry.name != FIRST, entry.name))
    setting, name = asked_for(settings.attention, phase)
    if name != "auto":
        entry = registry.get(name, setting)
        reason = entry.reason_against(spec)
        if reason is not None and not or_any:
            raise ConfigError(
                f"{setting} {name!r} cannot serve this model in {phase}: {reason}.", fix=f"Use {setting}=auto.", param=setting
            )
        found.sort(key=lambda other: other is not entry)
    if not found:
        reasons = "; ".join(f"{other}: {why}" for other, why in registry.why_not(spec).items())
        raise ConfigError(f"No attention backend supports this model in {phase}: {reasons}.", fix="Run `fluent doctor`.")
    return found


def attention_for(
    settings: Settings,
    spec: AttentionSpec,
    pool: KVPool,
    plugins: PluginManager,
    longest: int,
    library: Any = None,
    *,
    or_any: bool = False,
) -> AttentionBackend:
    """A backend on `pool`, made of all that its passes may need; they are compared, if that was not done before. `longest`:
    tokens of the longest sequence. Where `pool` is not on a GPU nothing is measured."""
    made: dict[str, AttentionBackend] = {}

    def backend(entry: Entry) -> AttentionBackend:
        if entry.name not in made:
            made[entry.name] = entry.factory(AttentionContext(spec, pool, settings, library))
            if isinstance(made[entry.name], PartialAttention):
                cast("PartialAttention", made[entry.name]).load()
        return made[entry.name]

    def order(phase: Phase) -> Order:
        entries = candidates(settings, spec, plugins, phase, or_any=or_any)
        compared = comparable(settings, entries, phase)
        if pool.device.type != "cuda" or len(compared) < 2:
            for entry in compared:
                backend(entry)  # on `meta`, while weights load: it starts to load what it has compiled
            return Order(map(backend, entries), named=asked_for(settings.attention, phase)[1] != "auto")
        rest = [entry for entry in entries if entry not in compared]

        def chosen() -> list[AttentionBackend]:
            found = choose(settings, spec, compared, phase, pool.device, longest)
            return until_sure(map(backend, [*found, *rest]))

        now = chosen()
        waiting = [late for late in map(backend, compared) if late not in now and isinstance(late, PartialAttention)]
        # Captured programs keep the kernels that they have.
        return Order(now, waiting, chosen) if waiting and phase == "prefill" else Order(now)

    return phased(order("prefill"), order("decode"), list(made.values()))


def comparable(settings: Settings, entries: Sequence[Entry], phase: Phase) -> list[Entry]:
    """Those of the candidates that a measurement is to decide between; fewer than two: there is nothing to decide."""
    if asked_for(settings.attention, phase)[1] != "auto":
        return []
    return [entry for entry in entries if entry.name != PLAIN]


def choose(
    settings: Settings, spec: AttentionSpec, entries: Sequence[Entry], phase: Phase, device: torch.device, longest: int
) -> list[Entry]:
    """Those of `entries` that can run now, the fastest first; measured now, if they never were side by side."""
    spec = replace(spec, phases=(phase,))
    wanted = points(phase, longest)
    names = able(settings, spec, entries, device, wanted[0])
    if len(names) < 2:
        return [entry for entry in entries if entry.name in names]
    facts = records.facts(spec, entries, device, longest)
    known = records.recall(facts, phase)
    if known is None or not names <= set(known.backends):
        started = time.perf_counter()
        times = compare(settings, spec, [entry for entry in entries if entry.name in names], device, wanted)
        known = records.Measurement(
            of=facts,
            phase=phase,
            taken=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
            backends=sorted({name for row in times.values() for name in row}),
            times=times,
        )
        log.info("compared attention backends for %s in %.2f s", phase, time.perf_counter() - started)
        records.keep(known)
    fastest = known.order()
    log.info("attention, %s: %s (µs a layer, %s)", phase, fastest[0] if fastest else entries[0].name, known.described())
    ranks = {name: rank for rank, name in enumerate(fastest)}
    return sorted((entry for entry in entries if entry.name in names), key=lambda entry: ranks.get(entry.name, len(ranks)))


def described(
    settings: Settings, spec: AttentionSpec, plugins: PluginManager, device: torch.device, longest: int
) -> dict[Phase, tuple[str, str]]:
    """Phase → (who would attend, why), as far as it is known without measuring. Raises `ConfigError` as a start would."""
    found: dict[Phase, tuple[str, str]] = {}
    for phase in PHASES:
        entries = candidates(settings, spec, plugins, phase)
        compared = comparable(settings, entries, phase)
        setting, name = asked_for(settings.attention, phase)
        used, why = entries[0].name, f"as set ({setting})" if name != "auto" else ""
        if len(compared) > 1 and device.type == "cuda":
            known = records.recall(records.facts(replace(spec, phases=(phase,)), compared, device, longest), phase)
            if known is None or not known.backends:
                why = "not compared yet: a start does, once kernels are compiled"
            else:
                used, why = known.order()[0], f"measured on {known.taken} UTC, µs a layer: {known.described()}"
        found[phase] = used, why
    return found
