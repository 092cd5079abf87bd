"""Tiny LongCat-Flash and DeepSeek-V3 with MTP layers, and what their drafts must be: computed from scratch, without a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from engine.harness import Harness, write_tiny_llama
from engine.test_every_model import LONGCAT, MODELS
from safetensors.torch import save_file

from fluentllm.core.batch import Batch
from fluentllm.core.hookspecs import hookimpl
from fluentllm.core.plugins import PluginManager
from fluentllm.core.protocols import BuildContext
from fluentllm.kernels import choose_ops
from fluentllm.kernels.sampling import gumbel_noise
from fluentllm.plugins.spec_mtp import MTPFactory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from fluentllm.core.protocols import Model, Proposer, ProposerContext, Register

VOCAB = 160
CONFIGS: dict[str, dict[str, Any]] = {
    "longcat": LONGCAT,
    "longcat_ngram": MODELS["longcat_ngram"],
    "deepseek_v3": {**MODELS["deepseek_v3"], "num_nextn_predict_layers": 1},
}
CLOSE = 1e-4
"""Two tokens whose scores differ by less may change places by rounding."""

Doctor = Callable[[list[int], list[int]], list[int]] if TYPE_CHECKING else Any
"""(history, MTP's drafts) → drafts to verify instead."""


def write_checkpoint(folder: Path, config: dict[str, Any]) -> Path:
    """Random weights, large enough that attention and experts decide what comes out; every MTP tensor is there."""
    write_tiny_llama(folder, base=config)
    family = PluginManager.load({"executor"}, allow=[], deny=[]).registry("models").get(config["architectures"][0]).factory
    device = torch.device("cpu")
    context = BuildContext(device=device, dtype=torch.float32, ops=choose_ops(device, deterministic=False), max_positions=64)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for slot in family.build(config, context).weight_slots():
        if not slot.unused:
            norm = len(slot.shape) == 1
            tensors[slot.name] = torch.randn(slot.shape, generator=generator) * (0.1 if norm else 0.25) + float(norm)
    save_file(tensors, folder / "model.safetensors")
    return folder


def harness(folder: Path, kind: str) -> Harness:
    overrides = {"model.load_format": "safetensors", "engine.deterministic": True, "kv.page_size": 8}
    overrides |= {"speculative.method": "mtp", "speculative.max_k": 5}
    return Harness(write_checkpoint(folder, CONFIGS[kind]), **overrides)


# -------------------------------------------------------------------------------------------------------------- reference
class WholeSequence:
    """An attention backend that keeps nothing: every pass is one sequence from its first token on."""

    def begin(self, batch: Batch) -> None: ...

    def mla(
        self,
        layer: int,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        up_k: Tensor,
        up_v: Tensor,
        batch: Batch,
        scale: float,
    ) -> Tensor:
        keys = torch.einsum("tc,hnc->thn", latent, up_k)
        scores = torch.einsum("qhn,thn->hqt", q_nope, keys) + torch.einsum("qhr,tr->hqt", q_rope, k_rope)
        future = torch.ones(scores.shape[1:]).triu(1).bool()
        weights = (scores * scale).masked_fill(future, float("-inf")).softmax(-1)
        return torch.einsum("hqt,tc,hvc->qhv", weights, latent, up_v)


def whole(tokens: list[int]) -> Batch:
    """All tokens of one sequence as the rows of a pass."""
    count = len(tokens)
    return Batch(
        tokens=torch.tensor(tokens),
        positions=torch.arange(count),
        sequences=torch.zeros(count, dtype=torch.int64),
        slots=torch.tensor([0]),
        query_start=torch.tensor([0, count], dtype=torch.int32),
        kv_lengths=torch.tensor([count], dtype=torch.int32),
        page_table=torch.zeros(1, 1, dtype=torch.int32),
        kv_rows=torch.zeros(count, dtype=torch.int64),
        history=torch.tensor([tokens], dtype=torch.int32),
        page_size=1,
        query_length=None,
        query_lengths=(count,),
        kv_lengths_host=(count,),
    )


class Reference:
    """Scores of the MTP layer's drafts after a history, from nothing but the tokens."""

    def __init__(self, model: Model) -> None:
        self.model: Any = model
        self._known: dict[tuple[int, ...], Tensor] = {}

    @torch.inference_mode()
    def scores(self, history: list[int], drafts: list[int]) -> Tensor:
        """[drafts, vocab] float32: logits that each draft was to be drawn from, given the drafts before it."""
        states = torch.cat((torch.zeros(1, self.model.spec.hidden_size), self._hidden(tuple(history[:-1]))))
        tokens = list(history)
        rows = []
        for draft in drafts:
            out = self.model.mtp.forward(states, whole(tokens), WholeSequence())
            rows.append(self.model.mtp.logits(out[-1:]))
            states, tokens = torch.cat((states, out[-1:])), [*tokens, draft]
        return torch.cat(rows)

    def _hidden(self, tokens: tuple[int, ...]) -> Tensor:
        if tokens not in self._known:
            self._known[tokens] = self.model.forward(whole(list(tokens)), WholeSequence())
        return self._known[tokens]


# --------------------------------------------------------------------------------------------------------------- watching
class Drafted:
    """One call's drafts for one slot."""

    def __init__(self, history: list[int], drafts: list[int], seed: int, temperature: float) -> None:
        self.history, self.drafts, self.seed, self.temperature = history, drafts, seed, temperature

    def check(self, reference: Reference) -> int:
        """How many of the drafts were the only choice; all must be a choice within rounding."""
        if not self.drafts:
            return 0
        scores = reference.scores(self.history, self.drafts)
        if self.temperature:
            positions = len(self.history) + torch.arange(len(self.drafts))
            noise = gumbel_noise(torch.full_like(positions, self.seed), positions, scores.shape[1])
            scores = scores / self.temperature + noise
        chosen = scores.gather(1, torch.tensor(self.drafts).unsqueeze(1))
        best, second = scores.topk(2, dim=1).values.unbind(1)
        assert (best - chosen.squeeze(1) < CLOSE).all(), (len(self.history), self.drafts, scores.argmax(1).tolist())
        return int((best - second > 2 * CLOSE).sum())


class Watched:
    """`mtp`, whose own drafts are recorded, and replaced by what `doctor` says before they are verified."""

    def __init__(self, context: ProposerContext, record: list[Drafted], doctor: Doctor) -> None:
        self._own: Proposer = MTPFactory()(context)
        self._tables = context.tables
        self._record = record
        self._doctor = doctor

    def draft(self, batch: Batch, hidden: Tensor, slots: Tensor, count: int) -> tuple[Tensor, Tensor]:
        drafts, valid = self._own.draft(batch, hidden, slots, count)
        assert drafts.shape == (len(slots), count)
        assert valid.tolist() == [count] * len(slots)
        drafts = drafts.clone()
        tables = self._tables
        for row, slot in enumerate(slots.tolist()):
            if tables.finished[slot]:
                continue
            history = tables.history[slot, : tables.length[slot]].tolist()
            own = drafts[row].tolist()
            self._record.append(Drafted(history, own, int(tables.seed[slot]), float(tables.temperature[slot])))
            drafts[row] = torch.tensor(self._doctor(history, own), dtype=torch.int64)
        return drafts, valid


class WatchedFactory(MTPFactory):
    def __init__(self, record: list[Drafted], doctor: Doctor) -> None:
        self._record, self._doctor = record, doctor

    def __call__(self, context: ProposerContext) -> Proposer:
        return Watched(context, self._record, self._doctor)


class WatchedPlugin:
    def __init__(self, record: list[Drafted], doctor: Doctor) -> None:
        self._factory = WatchedFactory(record, doctor)

    @hookimpl
    def fluent_proposers(self, register: Register) -> None:
        register("watched", self._factory)


def watched(record: list[Drafted], doctor: Doctor) -> PluginManager:
    return PluginManager.load({"engine", "executor"}, allow=[], deny=[], objects={"watched": WatchedPlugin(record, doctor)})


def half_right(texts: list[list[int]]) -> Doctor:
    """Drafts that are right up to a place that varies with the history, so that every number of them is accepted at times;
    the MTP layer's own from there on."""

    def doctor(history: list[int], own: list[int]) -> list[int]:
        text = next((t for t in texts if t[: len(history)] == history), history)
        right = text[len(history) : len(history) + len(history) * 7 % (len(own) + 1)]
        return [*right, *own[len(right) :]]

    return doctor
