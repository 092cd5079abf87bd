"""Models, memory, and what an engine tells of itself."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct, field


class KVSpec(Struct, frozen=True, kw_only=True):
    """Shape of one token's KV, and how many layers keep one."""

    kind: Literal["gqa", "mla"]
    layers: int
    heads: int = 0
    """gqa: KV heads."""
    head_dim: int = 0
    v_head_dim: int = 0
    latent_dim: int = 0
    """mla: width of the compressed latent."""
    rope_dim: int = 0
    """mla: width of the shared rotary key."""
    nope_dim: int = 0
    """mla: width of a head's key without its rotary part, in expanded form. Nothing that is kept."""
    value_dim: int = 0
    """mla: width of a head's value, in expanded form."""


class ModelSpec(Struct, frozen=True, kw_only=True):
    """What the engine must know of a model without looking inside."""

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    max_position: int
    """Longest context the checkpoint allows, prompt and answer together."""
    kv: KVSpec
    """Of the target; `kv.layers` does not count the draft layers."""
    eos_token_ids: tuple[int, ...] = ()
    draft_kv_layers: int = 0
    """KV layers, of the same shape, that the model's own draft layers (MTP) use: numbers kv.layers and up. A pool for
    speculation has kv.layers + draft_kv_layers layers."""


class SpeculativeInfo(Struct, frozen=True, kw_only=True):
    """Who drafts, and how much."""

    method: str
    k: int | Literal["auto"]
    max_k: int
    synthetic_acceptance: float | None = None
    """Drafts are accepted at random, for benchmarks: the answers mean nothing."""

    @property
    def synthetic(self) -> str | None:
        """The mark of synthetic acceptance, in words; None where drafts are accepted by the rules."""
        if self.synthetic_acceptance is None:
            return None
        return f"SYNTHETIC: drafts are accepted at random, {self.synthetic_acceptance} tokens a step, so answers mean nothing"


class Stage(Struct, frozen=True):
    """One stage of a start (`core/timeline.py`)."""

    process: str
    name: str
    start: float
    """Seconds since the first process was created."""
    end: float


class HandoffDoor(Struct, frozen=True, kw_only=True):
    """Where peers reach an engine that hands requests over."""

    role: str
    host: str = ""
    port: int = 0
    """0: it takes no connections, it makes them."""


class ModelInfo(Struct, frozen=True, kw_only=True):
    """What the engine tells the front end once it can serve."""

    name: str
    spec: ModelSpec
    max_model_len: int
    device: str
    dtype: str
    """Of activations."""
    memory: dict[str, int]
    """Name → bytes: weights, kv_pool, slots …"""
    kv_tokens: int
    """Tokens that the KV pool holds."""
    page_size: int
    slots: int
    kv_dtype: str = ""
    """Of the KV pool, as torch names it; empty if the engine does not say."""
    weight_precision: str = ""
    """What matrix weights are kept as, as `model.weight_precision` names it; empty if the engine does not say."""
    speculative: SpeculativeInfo | None = None
    """None where nothing drafts."""
    startup: tuple[Stage, ...] = ()
    """How this engine's start passed."""
    handoff: HandoffDoor | None = None
    """None for an engine that does all itself."""

    @property
    def synthetic(self) -> str | None:
        """What every answer and every figure of this engine must have beside it, since it means nothing; None of most."""
        return self.speculative.synthetic if self.speculative is not None else None


class KVEvent(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A change of the prefix cache, for KV-aware routers: pages entered or left the radix tree."""

    kind: Literal["stored", "removed", "cleared"]
    blocks: list[int] = field(default_factory=list)
    """Chained hashes of the pages, unsigned 64-bit."""
    parent: int | None = None
    """Hash of the page before the first of `blocks`; None at the start of a sequence."""
    tokens: list[int] = field(default_factory=list)
    page_size: int = 0


class SpeculativeStats(Struct, frozen=True, kw_only=True):
    """Drafts since the start, and how far they were right."""

    info: SpeculativeInfo
    verifications: int = 0
    """Times that a sequence's drafts were verified; each brought its accepted drafts and one token of the target's own."""
    drafted: list[int] = field(default_factory=list)
    """For each position, first to last: how often it held a draft."""
    accepted: list[int] = field(default_factory=list)
    """And how often that and all before it were right."""
    error: str | None = None
    """Why the proposer was switched off."""
    collapsed: bool = False
    """Acceptance has collapsed: it is switched off for a while, or being tried again."""
    collapses: int = 0
    """How often that happened."""

    @property
    def mean_accepted_length(self) -> float:
        """Tokens a verification, the target's own included."""
        return 1 + sum(self.accepted) / self.verifications if self.verifications else 1.0


class PluginCalls(Struct, frozen=True, kw_only=True):
    """What one plugin has cost at one place since the process started. Times in seconds."""

    plugin: str
    hook: str
    """A hook's name, `import`, or the path of a route (until its answer begins)."""
    calls: int
    failures: int
    seconds: float
    """Of all calls together."""
    longest: float
    enabled: bool = True
    """False: an observer that failed too often, and is called no more."""


class EngineStats(Struct, frozen=True, kw_only=True):
    waiting: int
    running: int
    pages_total: int
    pages_free: int
    pages_cached: int
    """Held by the radix tree (some also by requests)."""
    pages_leased: int
    """Held by requests, remote writers or handoffs that send them."""
    steps: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    preemptions: int
    plugins: list[PluginCalls] = field(default_factory=list)
    """Of the engine's process."""
    refused: dict[str, int] = field(default_factory=dict)
    """Requests that did not enter, by the code of the error."""
    speculative: SpeculativeStats | None = None
    """None where nothing drafts."""
    handoff: dict[str, int] = field(default_factory=dict)
    """Counters of handoffs between prefill and decode engines; empty where there are none."""
