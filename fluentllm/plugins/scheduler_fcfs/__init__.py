"""First come, first served, within priorities: the default scheduling policy."""

from __future__ import annotations

from ...core.hookspecs import hookimpl
from ...core.protocols import Register, Scheduler, SchedulerContext


class SchedulerFcfs:
    @hookimpl
    def fluent_schedulers(self, register: Register) -> None:
        register("fcfs", _create)


def _create(context: SchedulerContext) -> Scheduler:
    from .scheduler import FcfsScheduler

    return FcfsScheduler(context)


plugin = SchedulerFcfs()
