"""The plugin manager: loads the plugins that a process needs and resolves their hooks, once, at start.

    plugins = PluginManager.load({"engine", "executor"}, settings.plugins.allow, settings.plugins.deny)
    plugins.registry("schedulers").get("fcfs").factory(context)

`discovery.py` finds the entry points, `checks.py` holds each plugin to the contract, `registry.py` keeps what they
offer, `observers.py` times and contains the calls. What a third-party plugin breaks by itself (an import, its own
registration) is contained, reported and leaves it out; what leaves in doubt who does what stops the start.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import pluggy

from .. import hookspecs
from ..errors import PluginError
from ..hookspecs import PROJECT
from .burden import TorchWatch
from .checks import check
from .clashes import clash
from .discovery import PluginInfo, admit, allowed_by_environment, discover, normalized
from .observers import OBSERVER_HOOKS, Call, Ledger, Observer, Observers
from .registry import Entry, Registry, supports_everything
from .routes import Route, RouteTable
from .staleness import stale_entries

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    import typer

    from ..protocols import EngineCall, Supports

log = logging.getLogger("fluentllm.plugins")

REGISTRIES: dict[str, tuple[str, str | None]] = {
    "models": ("model architecture", None),
    "weights": ("checkpoint reader", "model.load_format"),
    "schedulers": ("scheduling policy", "scheduler.policy"),
    "attention": ("attention backend", "attention.backend"),
    "proposers": ("proposer of drafts", "speculative.method"),
    "kv_transports": ("KV transport", "disaggregation.transport"),
    "handoffs": ("way to hand requests over", "disaggregation.method"),
    "grammars": ("grammar engine", None),
    "answer_formats": ("answer format", "model.answer_format"),
}
"""Kind → what one is called, and the setting that chooses it. The hook is `fluent_<kind>`."""


HOOK_PROCESSES = {
    "fluent_routes": "frontend",
    "fluent_answer_formats": "frontend",
    "fluent_calls": "engine",
    **dict.fromkeys(OBSERVER_HOOKS, "engine"),
    "fluent_commands": "cli",
}
"""Hooks that are called in one process only, since what they import is heavy or what they watch is there. The others
are called wherever the plugin is loaded."""


class PluginManager:
    """The plugins of one process. Made by `load`."""

    def __init__(
        self,
        infos: list[PluginInfo],
        sink: Callable[[Call], None] | None = None,
        *,
        processes: Collection[str] | None = None,
        strict: bool = True,
    ) -> None:
        self.infos = infos
        """Every installed plugin, loaded or not."""
        self._processes = processes
        self._strict = strict
        self.ledger = Ledger(sink)
        self._hooks = pluggy.PluginManager(PROJECT)
        self._hooks.add_hookspecs(hookspecs)
        self._registries = {kind: Registry(kind, *about) for kind, about in REGISTRIES.items()}
        self._routes = RouteTable()
        self._structs: dict[str, type[msgspec.Struct]] = {}
        self._engine_calls: dict[str, tuple[PluginInfo, EngineCall]] = {}
        self._torch = TorchWatch(processes)
        self.observers = Observers(self.ledger, {})

    @classmethod
    def load(
        cls,
        processes: Collection[str] | None,
        allow: Collection[str] | None = None,
        deny: Collection[str] = (),
        *,
        objects: Mapping[str, Any] | None = None,
        trace: Callable[[Call], None] | None = None,
        only: Collection[str] | None = None,
        hooks: Collection[str] | None = None,
        strict: bool = True,
    ) -> PluginManager:
        """Load the plugins that run in any of `processes` (None: in any at all), and resolve their hooks.

        `allow`: the third-party plugins that may load; None means what `FLUENT_PLUGINS` says, and all if that is unset.
        `deny`: plugins, built-in or not, that may not. `objects`: further plugins, as name → object, without an entry point.
        `trace` is told every call into a plugin. `only`: of all these, import no others. `hooks`: call none but these.
        `strict`: False contains also what a built-in plugin breaks, for commands that list and diagnose.
        Raises `PluginError`, or `ConfigError` for a name on the allow list that is not installed.
        """
        infos = discover()
        unknown = admit(infos, allowed_by_environment() if allow is None else allow, deny)
        for name in unknown:
            log.warning("plugins.deny names %r, which is not installed", name)
        manager = cls(infos, trace, processes=processes, strict=strict)
        for stale in stale_entries(infos):
            log.warning("%s", stale)
        for info in infos:
            wanted = processes is None or info.runs_in(processes)
            if info.state == "found" and wanted and (only is None or info.name in only):
                manager._import(info)
        for name, plugin in (objects or {}).items():
            manager._add_object(normalized(name), plugin)
        manager._hooks.check_pending()
        manager._resolve(hooks)
        return manager

    # -------------------------------------------------------------------------------------------------- what plugins gave
    def registry(self, kind: str) -> Registry:
        """`models`, `weights`, `schedulers`, `attention`, `proposers`, `kv_transports`, `handoffs`, `grammars` or
        `answer_formats`."""
        return self._registries[kind]

    def routes(self) -> Sequence[Route]:
        return self._routes.routes

    def calls(self) -> dict[str, EngineCall]:
        """What plugins offer to front ends, by name; timed like every call into a plugin."""
        return {
            name: partial(self.ledger.call, info.name, "fluent_calls", function)
            for name, (info, function) in self._engine_calls.items()
        }

    def calls_of(self, plugin: str) -> list[str]:
        """Names of the calls that one plugin offers."""
        return [name for name, (info, _) in self._engine_calls.items() if info.name == plugin]

    def config_structs(self) -> dict[str, type[msgspec.Struct]]:
        """Plugin name → the Struct of its settings, for the loaded plugins that have some."""
        return dict(self._structs)

    def info(self, name: str) -> PluginInfo | None:
        return next((info for info in self.infos if info.name == normalized(name)), None)

    def add_commands(self, app: typer.Typer) -> None:
        """Let plugins add subcommands to `app`. Raises `PluginError` if two commands have one name."""
        from .commands import CommandTable

        table = CommandTable(app)
        for info, function, positions in self._implementations("fluent_commands"):
            table.begin(info)
            self._contained(info, "fluent_commands", partial(function, *(app for _ in positions)), table.roll_back)
            table.end(info)

    # ------------------------------------------------------------------------------------------------------------ loading
    def _import(self, info: PluginInfo) -> None:
        assert info.entry is not None
        module = info.value.split(":")[0].strip()
        started = time.monotonic()
        try:
            if info.builtin and importlib.util.find_spec(module) is None:
                info.state, info.problem = "missing", f"there is no module {module}; reinstall {info.distribution}"
                log.warning("%s: %s", info, info.problem)
                return
            with self._torch.blaming(info):
                info.plugin = self.ledger.call(info.name, "import", info.entry.load)
        except (Exception, SystemExit) as error:
            self._leave_out(info, f"importing {info.value} raised", error)
            return
        info.import_seconds = time.monotonic() - started
        info.file = getattr(importlib.import_module(module), "__file__", None)
        self._register(info)

    def _add_object(self, name: str, plugin: Any) -> None:
        module = getattr(plugin, "__module__", getattr(plugin, "__name__", "?"))
        info = PluginInfo(name, module, "given as an object", "", (), builtin=False, plugin=plugin)
        if any(other.name == name and other.state == "loaded" for other in self.infos):
            raise PluginError(f"Two plugins are named {name!r}: {self.info(name)} and {info}.", fix="Rename the object.")
        self.infos.append(info)
        self._register(info)

    def _register(self, info: PluginInfo) -> None:
        check(info)
        self._hooks.register(info.plugin, name=info.name)
        info.state = "loaded"

    def _leave_out(self, info: PluginInfo, what: str, error: BaseException) -> None:
        """A built-in plugin that fails is a broken installation; another's is that plugin's own affair."""
        if info.builtin and self._strict:
            raise PluginError(
                f"The built-in {info} failed: {what} {type(error).__name__}: {error}.",
                fix=f"Reinstall fluentllm, or start without it: `plugins.deny: [{info.name}]`.",
            ) from error
        info.state, info.problem = "failed", f"{what} {type(error).__name__}: {error}"
        log.warning("%s is left out: %s", info, info.problem, exc_info=error if log.isEnabledFor(logging.DEBUG) else None)

    # ---------------------------------------------------------------------------------------------------------- resolving
    def _implementations(self, hook: str) -> Iterable[tuple[PluginInfo, Callable[..., Any], tuple[int, ...]]]:
        """Who implements it, in the order of calls; with the positions of the hook's arguments that each one takes."""
        caller = getattr(self._hooks.hook, hook)
        names = list(caller.spec.argnames)
        by_name = {info.name: info for info in self.infos if info.state == "loaded"}
        for implementation in reversed(caller.get_hookimpls()):
            info = by_name.get(implementation.plugin_name)
            if info is not None:
                yield info, implementation.function, tuple(names.index(name) for name in implementation.argnames)

    def _contained(self, info: PluginInfo, hook: str, call: Callable[[], Any], undo: Callable[[str], None]) -> None:
        try:
            with self._torch.blaming(info):
                self.ledger.call(info.name, hook, call)
        except PluginError:
            raise
        except (Exception, SystemExit) as error:
            undo(info.name)
            self._leave_out(info, f"{hook} raised", error)

    def _resolve(self, hooks: Collection[str] | None) -> None:
        steps: list[tuple[str, Callable[[PluginInfo], Callable[..., None]]]] = [("fluent_config", self._config_register)]
        steps += [(f"fluent_{kind}", self._registrar(kind)) for kind in REGISTRIES]
        steps += [("fluent_routes", self._routes.registrar), ("fluent_calls", self._call_register)]
        for hook, registrar in steps:
            if not self._calls(hook, hooks):
                continue
            for info, function, positions in self._implementations(hook):
                call = partial(function, *(registrar(info) for _ in positions))
                self._contained(info, hook, call, self._forget)
        observers = {
            hook: [
                Observer(info.name, hook, _selecting(function, positions, len(getattr(self._hooks.hook, hook).spec.argnames)))
                for info, function, positions in self._implementations(hook)
            ]
            for hook in OBSERVER_HOOKS
            if self._calls(hook, hooks)
        }
        self.observers = Observers(self.ledger, observers)

    def _calls(self, hook: str, hooks: Collection[str] | None) -> bool:
        process = HOOK_PROCESSES.get(hook)
        here = process is None or self._processes is None or process in self._processes
        return here and (hooks is None or hook in hooks)

    def _forget(self, plugin: str) -> None:
        for registry in self._registries.values():
            registry.remove_plugin(plugin)
        self._routes.remove_plugin(plugin)
        self._structs.pop(plugin, None)
        self._engine_calls = {name: (info, call) for name, (info, call) in self._engine_calls.items() if info.name != plugin}

    def _registrar(self, kind: str) -> Callable[[PluginInfo], Callable[..., None]]:
        def for_plugin(info: PluginInfo) -> Callable[..., None]:
            def register(name: str, factory: Any, *, supports: Supports = supports_everything) -> None:
                self._registries[kind].add(Entry(name, factory, info.name, str(info), supports))

            return register

        return for_plugin

    def _call_register(self, info: PluginInfo) -> Callable[..., None]:
        def register(name: str, function: EngineCall) -> None:
            other = self._engine_calls.get(name)
            if other is not None:
                first, second = ((one.name, str(one)) for one in (other[0], info))
                raise clash("offer", f"the engine's call {name!r}", first, second)
            if not callable(function):
                raise PluginError(f"{info} offers the call {name!r} with {function!r}.", fix="Pass a function to register().")
            self._engine_calls[name] = (info, function)

        return register

    def _config_register(self, info: PluginInfo) -> Callable[..., None]:
        def register(struct: type[msgspec.Struct]) -> None:
            if not (isinstance(struct, type) and issubclass(struct, msgspec.Struct)):
                raise PluginError(f"{info} registers {struct!r} as its settings.", fix="Register a subclass of msgspec.Struct.")
            if info.name in self._structs:
                raise PluginError(f"{info} registers two Structs for its settings.", fix="Nest one in the other.")
            try:
                msgspec.inspect.type_info(struct)  # as filling it does
            except Exception as error:
                raise PluginError(
                    f"{info} registers {struct.__qualname__}, whose fields have no usable types: {error}.",
                    fix="Import what its annotations name when the module is loaded, not under TYPE_CHECKING.",
                ) from error
            self._structs[info.name] = struct

        return register


def _selecting(function: Callable[..., Any], positions: tuple[int, ...], arity: int) -> Callable[..., Any]:
    """`function` as one that takes all of the hook's arguments."""
    if positions == tuple(range(arity)):
        return function
    return lambda *arguments: function(*(arguments[position] for position in positions))
