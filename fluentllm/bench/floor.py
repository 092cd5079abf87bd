"""The floor of a decode step: the bytes that it must read, at the rate at which this device copies.

With drafts a step verifies, of each sequence, one row more than drafts: the target's weights once, but of experts those of all
rows; and it makes as many drafts again, one pass of the draft layer after another, each with its own experts, the head and the
layer's KV. The target's KV is read once for all rows of a sequence. A pass of the draft layer counts one row a sequence: the
first has more, but beside the newest one's they read an embedding's rows only.

Weights are counted as they lie in the loaded model, whatever they are packed to: all of them once, of experts the expected
number of distinct ones with weights, of embeddings (n-gram tables too) the rows of the batch's tokens. A head that is tied to
the embedding is a matrix like another. Of the KV cache what the lengths say. Activations and sampling cost nothing here.

On a CPU a step may be faster than that: a copy does not fit into its caches, and makes it read what is then overwritten, so
that reading alone is quicker.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ..core.kv.formats import token_bytes
from ..kernels.weights import TwoWeights
from ..layers.embedding import Embedding
from ..layers.module import Module, held
from ..layers.moe import SparseMoE
from ..layers.ngram import NgramEmbedding
from .costs import copy_rate, distinct_experts

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..core.engine import Engine
    from ..core.executor import Programs
    from ..core.protocols import DraftReads
    from ..core.types import KVSpec, ModelInfo
    from ..kernels.moe import Routing
    from ..kernels.weights import Weight
    from .offline import Drafts


@dataclass(frozen=True, slots=True)
class Floor:
    """Of one engine."""

    model: Module
    info: ModelInfo
    bytes_s: float
    """That a copy reads and writes on the engine's device, measured."""
    reads: DraftReads | None = None
    """What its proposer reads; None: nothing drafts."""

    @classmethod
    def of(cls, engine: Engine) -> Floor | None:
        """None for proposers that do not tell what they read (`core.protocols.CountedProposer`), and for models that are not
        made of our layers, of whose weights nothing is known. The copy runs on the thread that launches steps, between two of
        them: on a CPU another's pool of workers would slow steps down."""
        programs = engine.executor.programs
        model, reads = _model(programs), getattr(getattr(programs, "proposer", None), "reads", None)
        if model is None or (engine.info.speculative is not None and reads is None):
            return None
        rate = engine.executor.call(partial(copy_rate, engine.executor.device)).result()
        return cls(model, engine.info, rate, reads)

    def seconds(self, batch: int, length: float, drafts: int = 0) -> float:
        """Of a step of `batch` sequences with `length` tokens each, the step's own included, that verifies and makes so many
        drafts of each."""
        rows = batch * (drafts + 1)
        total = weight_bytes(self.model, rows) + self._kv(self.info.spec.kv, batch * length)
        if drafts and self.reads is not None:
            total += _bytes(_below(self.reads.once), rows)
            each = _bytes(_below(self.reads.each), batch)
            total += drafts * (each + (self._kv(self.reads.kv, batch * length) if self.reads.kv is not None else 0.0))
        return total / self.bytes_s

    def seconds_a_token(self, batch: int, length: float, drafts: Drafts) -> float:
        """The mean of the sequences' steps, each with the drafts that it verified, by the tokens that one brought."""
        found = sum(steps * self.seconds(batch, length, count) for count, steps in drafts.decodes.items())
        return found / drafts.decoded

    def _kv(self, kv: KVSpec, tokens: float) -> float:
        return tokens * kv.layers * token_bytes(kv, self.info.kv_dtype)


def routing_of(programs: Programs) -> Routing | None:
    """How the model's layers with experts choose; None: it has none, or is not made of our layers."""
    model = _model(programs)
    blocks = model.modules() if model is not None else ()
    return next((block.routing for block in blocks if isinstance(block, SparseMoE)), None)


def weight_bytes(model: Module, tokens: int) -> float:
    """Bytes of weights that a pass of `tokens` tokens must read, each with logits; draft layers are left out."""
    return _bytes(_without_drafts(model), tokens)


def _below(modules: Iterable[Module]) -> Iterator[Module]:
    """These and all below them, parents first, each once."""
    return iter({id(part): part for module in modules for part in module.modules()}.values())


def _bytes(modules: Iterable[Module], tokens: int) -> float:
    """`modules`: parents first."""
    total = 0.0
    shares: dict[int, tuple[float, float]] = {}
    """Of experts by their identity."""
    for module in modules:
        if isinstance(module, Embedding):
            total += tokens * module.table[0].nbytes
        elif isinstance(module, NgramEmbedding):
            gathered = tokens * len(module.starts) * module.tables[0].nbytes
            total += _held(module, tokens) - module.tables.nbytes + gathered
        elif id(module) in shares:
            share, rows = shares[id(module)]
            total += share * _held(module, rows)
        else:
            total += _held(module, tokens)
        if isinstance(module, SparseMoE):
            # Parents come first.
            shares[id(module.experts)] = _share(module.routing, tokens)
    return total


def _share(routing: Routing, tokens: int) -> tuple[float, float]:
    """→ the share of the experts with weights that somebody chooses, and how many tokens each of them has on average."""
    distinct = distinct_experts(routing, tokens)
    pairs = tokens * (routing.top_k * routing.experts / routing.total + routing.shared)
    return distinct / (routing.experts + routing.shared), pairs / distinct


def _model(programs: Programs) -> Module | None:
    model = getattr(programs, "model", None)
    return model if isinstance(model, Module) else None


def _without_drafts(model: Module) -> Iterator[Module]:
    """Parents first."""
    draft = getattr(model, "mtp", None)
    if not isinstance(draft, Module):
        return model.modules()
    # It may have taken the target's embedding and head for its own.
    shared = {id(module) for module in (getattr(model, name, None) for name in ("embedding", "head"))}
    drafting = {id(module) for module in draft.modules()} - shared
    return (module for module in model.modules() if id(module) not in drafting)


def _held(module: Module, rows: float) -> float:
    """Bytes of its own tensors and packed matrices, each once though both may be kept of one; what `rows` rows use."""
    matrices, tensors = held([module])
    return sum(_matrix(matrix, rows) for matrix in matrices) + sum(tensor.nbytes for tensor in tensors)


def _matrix(weight: Weight, rows: float) -> int:
    if isinstance(weight, TwoWeights) and weight.many is not None and rows > weight.border:
        return weight.many.nbytes
    return weight.few.nbytes if isinstance(weight, TwoWeights) else weight.nbytes
