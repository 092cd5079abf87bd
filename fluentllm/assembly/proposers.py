"""The proposer that the settings choose, and its plugin at start: every call is told by its name when it fails.

What a factory says and makes is checked here, before anything depends on it. What a proposer does in a step is `step.decode`'s
affair: one that fails there is dropped.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.errors import CheckpointError, ConfigError, FluentError, OutOfMemory, PluginError
from ..core.protocols import DraftMemory
from ..core.types import KVSpec
from .choices import draft_length, synthetic_share

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..core.plugins import PluginManager
    from ..core.plugins.registry import Entry
    from ..core.protocols import DraftContext, DraftTarget, Proposer, ProposerContext
    from ..core.settings import Settings
    from ..core.types import ModelSpec

log = logging.getLogger(__name__)

PARAM = "speculative.method"


@dataclass(frozen=True, slots=True)
class ChosenProposer:
    """A `core.protocols.ProposerFactory` and who offers it.

    All methods raise `PluginError` for what the plugin does wrong; what it refuses itself passes as it is.
    """

    entry: Entry

    @property
    def name(self) -> str:
        """How log and errors call it."""
        return f"proposer {self.entry.name!r} of plugin {self.entry.plugin!r}"

    @property
    def loads(self) -> bool:
        """Has it a model of its own?"""
        return getattr(self.entry.factory, "load", None) is not None

    def memory(self, target: DraftTarget) -> DraftMemory:
        """What it keeps in the pool; nothing where it says nothing."""
        with self._blamed("its memory()"):
            ask = getattr(self.entry.factory, "memory", None)
            memory = ask(target) if ask is not None else DraftMemory()
        wrong = _wrong_memory(memory)
        if wrong is not None:
            raise self._wrong(f"its memory() {wrong}", "Return a DraftMemory (docs/speculation.md).")
        return memory

    def load(self, context: DraftContext) -> tuple[Any, int]:
        """Its own model, None where it has none, and the bytes that this takes."""
        if not self.loads:
            return None, 0
        with self._blamed("its load()"):
            try:
                model = self.entry.factory.load(context)
            except (torch.OutOfMemoryError, MemoryError) as error:
                raise OutOfMemory(
                    f"The model of {self.name} does not fit beside the target's: {error}.",
                    fix="Free memory on the device, or use speculative.method=pld, which has none, or none.",
                    param=PARAM,
                ) from error
        with self._blamed("what its load() gave"):
            size = model.nbytes() if model is not None else 0
        if not isinstance(size, int) or size < 0:
            raise self._wrong(f"nbytes() of what its load() gave is {size!r}", "Return how many bytes its weights take.")
        return model, size

    def make(self, context: ProposerContext) -> Proposer:
        """The proposer, which has a `draft` to call."""
        with self._blamed("its factory"):
            made: Proposer = self.entry.factory(context)
            drafts = callable(getattr(made, "draft", None))
        if not drafts:
            given = "None" if made is None else f"a {type(made).__name__}"
            raise self._wrong(
                f"its factory gave {given}, which has no method draft", "Return a Proposer; see docs/speculation.md."
            )
        return made

    def page_states(self, made: Proposer, pages: int) -> tuple[Tensor, ...]:
        """What it keeps for each of the usable pages, for requests that are handed over."""
        with self._blamed("its page_states"):
            states = tuple(getattr(made, "page_states", ()))
        for state in states:
            if not isinstance(state, Tensor) or state.dim() == 0 or len(state) != pages + 1 or not state.is_contiguous():
                found = f"{list(state.shape)} {state.dtype}" if isinstance(state, Tensor) else type(state).__name__
                raise self._wrong(
                    f"its page_states have {found}, not a contiguous tensor of {pages + 1} rows",
                    "Keep a row for each of ProposerContext.pages, and one for the scratch page.",
                )
        return states

    @contextmanager
    def _blamed(self, what: str) -> Iterator[None]:
        """Whatever is raised inside, it is said of whom. Memory that runs out is told with numbers, by who measures it."""
        try:
            yield
        except CheckpointError as error:
            raise CheckpointError(f"The {self.name}: {error.message}", fix=error.fix, param=error.param or PARAM) from error
        except (FluentError, torch.OutOfMemoryError, MemoryError):
            raise
        except (Exception, SystemExit) as error:
            log.exception("%s of %s failed", what, self.name)
            raise self._wrong(f"{what} raised {type(error).__name__}: {error}", "The log has the traceback.") from error

    def _wrong(self, what: str, fix: str) -> PluginError:
        return PluginError(
            f"The {self.name} cannot be used: {what}.",
            fix=f"{fix} Without it: speculative.method=none, or another proposer.",
            param=PARAM,
        )


def choose_proposer(settings: Settings, spec: ModelSpec, plugins: PluginManager) -> ChosenProposer | None:
    """Who drafts; None for nobody, by the method or a k of 0. Raises `ConfigError` for one that there is not, or that is not
    for such a model or such settings, also where k is 0."""
    lengths, chosen = draft_length(settings), settings.speculative
    if chosen.method == "none":
        return None
    proposer = ChosenProposer(plugins.registry("proposers").require(chosen.method, spec))
    if chosen.model is not None and not proposer.loads:
        raise ConfigError(
            f"speculative.model is {chosen.model!r}, but the {proposer.name} has no model of its own.",
            fix="Set speculative.model to null, or use a method that needs one, such as eagle.",
            param="speculative.model",
        )
    return proposer if lengths is not None else None


def check_speculation(settings: Settings, spec: ModelSpec, plugins: PluginManager, target: DraftTarget) -> None:
    """Before anything is loaded. Raises `ConfigError` for what cannot work with this model, and as `ChosenProposer`."""
    drafts = draft_length(settings)
    synthetic_share(settings, drafts.max_k if drafts is not None else 0)
    wanted = settings.speculative
    if wanted.method == "none" and (wanted.k not in ("auto", 0) or wanted.model is not None):
        idle = f"speculative.model {wanted.model!r}" if wanted.model is not None else f"speculative.k {wanted.k}"
        log.warning("%s has no effect: speculative.method is none, so nothing drafts; --speculative chooses", idle)
    proposer = choose_proposer(settings, spec, plugins)
    if proposer is not None:
        proposer.memory(target)


def _wrong_memory(memory: Any) -> str | None:
    """Why a pool cannot be planned with it."""
    if not isinstance(memory, DraftMemory):
        return f"gave a {type(memory).__name__}"
    for name in ("kv_layers", "bytes_per_page"):
        number = getattr(memory, name)
        if not isinstance(number, int) or number < 0:
            return f"gave {name} {number!r}, not a whole number of 0 or more"
    if memory.kv is not None and memory.kv_layers:
        return f"gave both kv_layers {memory.kv_layers} and kv, which stands instead"
    return _wrong_kv(memory.kv) if memory.kv is not None else None


def _wrong_kv(kv: Any) -> str | None:
    if not isinstance(kv, KVSpec):
        return f"gave a {type(kv).__name__} as kv, not a KVSpec"
    if kv.layers < 1 or (min(kv.heads, kv.head_dim, kv.v_head_dim) if kv.kind == "gqa" else kv.latent_dim) < 1:
        return f"gave {kv!r}, which has no layer, or a layer without size"
    return None
