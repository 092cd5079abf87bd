"""What plugins' objects promise: the typed half of the contract whose other half is `hookspecs`.

Torch-free: tensors and modules appear in annotations only. A factory is called once, at assembly; the engine then calls
plain bound methods of what it returned.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import msgspec
    import torch
    from torch import Tensor

    from .batch import Batch
    from .kv.cache import KVCache
    from .kv.pool import KVPool
    from .sequence import Sequence
    from .settings import Settings
    from .slots import SlotTables
    from .types import Drafting, ModelSpec, StepPlan

# ------------------------------------------------------------------------------------------------------------ registration
Supports = Callable[[Any], str | None]
"""Given the spec in question, None, or the reason why not."""


class Register(Protocol):
    """`register(name, factory, supports=...)`: offer something that the config chooses by name, or `auto` chooses."""

    def __call__(self, name: str, factory: Callable[..., Any], *, supports: Supports = ...) -> None: ...


class RegisterConfig(Protocol):
    def __call__(self, struct: type[msgspec.Struct]) -> None: ...


class RegisterModel(Protocol):
    def __call__(self, architecture: str, family: ModelFamily) -> None: ...


class RegisterWeights(Protocol):
    """`supports(path)` says whether the reader can open what lies at `path` (a folder or a file)."""

    def __call__(self, name: str, factory: Callable[[WeightsContext], Checkpoint], *, supports: Supports = ...) -> None: ...


class RegisterRoute(Protocol):
    """`endpoint(request: starlette.requests.Request) -> starlette.responses.Response`, async. The front end's services
    are at `request.app.state.fluent` (`fluentllm.frontend.services.Services`)."""

    def __call__(
        self, path: str, endpoint: Callable[[Any], Awaitable[Any]], *, methods: SequenceOf[str] = ("GET",), summary: str = ""
    ) -> None: ...


# -------------------------------------------------------------------------------------------------------------- scheduling
@dataclass(frozen=True, slots=True)
class SchedulerContext:
    """What a policy is made from. `kv` does the bookkeeping of pages; the policy decides who runs."""

    settings: Settings
    kv: KVCache
    slots: int
    """Sequences that can be on the device at once."""
    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()
    max_drafts: int = 0
    """A step may write KV for twice as many tokens past the end of a sequence."""
    prefill_tokens: int = 512
    """Most prompt tokens of a step."""


class Scheduler(Protocol):
    """Decides what each step computes. Called from the engine's loop only; may not block.

    The engine launches up to `overlap_depth` steps ahead of what it has collected, so `plan` must count on the longest
    that a sequence can be (`Sequence.longest`), not on what is known of it.
    """

    def add(self, sequence: Sequence) -> None:
        """Queue it. Raises `QueueFull`."""
        ...

    def abort(self, sequence: Sequence) -> None:
        """Plan it no more; its slot and pages are released once every step that names it has been collected."""
        ...

    def plan(self, step: int, drafting: Drafting) -> StepPlan | None:
        """The next step, or None if nothing can run now.

        Every sequence that decodes brings at most `drafting.verify` + 1 tokens and needs pages for
        `Sequence.longest` + `drafting.verify` + `drafting.draft` tokens, and where anything drafts (`max_drafts` > 0) for
        `Sequence.longest` + `drafting.verify` + 1 at least; a prompt's last chunk needs them for `max_drafts` tokens past the
        prompt. What is missing is not written, so drafts get worse. `drafting` goes into the plan as it is. Each sequence in
        the plan is told by `Sequence.launch`, and again by `Sequence.collect` when the step was collected.
        """
        ...

    def collected(self, plan: StepPlan, finished: SequenceOf[Sequence]) -> None:
        """The step's results are in the sequences; release what no step names any more."""
        ...

    def sequence(self, slot: int) -> Sequence:
        """Who holds the slot."""
        ...

    @property
    def waiting(self) -> int: ...

    @property
    def running(self) -> int: ...

    @property
    def preemptions(self) -> int: ...


# --------------------------------------------------------------------------------------------------------- models, weights
@dataclass(slots=True)
class WeightSlot:
    """One tensor that a model expects from a checkpoint, by its checkpoint name."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[Tensor], None]
    """Take the tensor, of exactly `shape`, any float dtype, on any device: copy it into place."""
    load_packed: Callable[[PackedTensor], bool] | None = None
    """Take block-quantised rows as they are; False if this place cannot (the caller then dequantises)."""
    optional: bool = False
    init: Literal["normal", "ones", "zeros"] = "normal"
    """How `--load-format dummy` fills it: normal is N(0, 0.02²)."""
    unused: bool = False
    """Accepted where a checkpoint has it, and dropped: never read."""
    drafts: bool = False
    """Of the model's own draft layers: random weights hold it where the model's own layers draft."""


@dataclass(slots=True)
class PackedTensor:
    """A weight [rows, columns] quantised in blocks, as a checkpoint ships it."""

    kind: str
    """`q4_1`: value = d · q + m, blocks of 32 of a row, q in 0 … 15. `q8_0`: value = d · q, blocks of 32, q in -128 … 127.
    `fp8_block`: value = scale · q, blocks of 128 × 128, q in E4M3."""
    shape: tuple[int, int]
    parts: dict[str, Tensor]
    """q4_1: `q` uint8 [rows, columns], `d`, `m` float32 [rows, columns / 32]. q8_0: `q` int8, `d`, of the same shapes.
    fp8_block: `q` float8_e4m3fn [rows, columns], `scale` float32 [⌈rows / 128⌉, ⌈columns / 128⌉]."""


class Checkpoint(Protocol):
    """An open checkpoint. Shapes and names are Hugging Face's, whatever the file's own."""

    config: Mapping[str, Any]
    """As `config.json` has it."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor, in file order (the cheapest order to read them in)."""
        ...

    def read(self, name: str, device: torch.device) -> Tensor:
        """The tensor, dequantised where its format asks for it."""
        ...

    def packed(self, name: str) -> PackedTensor | None:
        """Its blocks as they are, if the checkpoint stores it in a kind that `PackedTensor` knows."""
        ...

    def close(self) -> None: ...


class StreamingCheckpoint(Checkpoint, Protocol):
    """One that can read ahead. Loading to a GPU uses it where a checkpoint has the method."""

    def stream(self, names: SequenceOf[str], device: torch.device) -> Iterator[Tensor]:
        """What `read` gives for each of `names`, in their order, ready for the device's current stream."""
        ...

    def stream_packed(self, names: SequenceOf[str], device: torch.device) -> Iterator[PackedTensor | None]:
        """What `packed` gives for each of `names`, on the device. Asked for where a checkpoint has the method."""
        ...


@dataclass(frozen=True, slots=True)
class WeightsContext:
    path: Path
    """Folder or file."""
    settings: Settings
    slots: Iterable[WeightSlot] | None = None
    """For readers that make weights up (dummy): what the model expects."""


@dataclass(slots=True)
class BuildContext:
    """How to build a model: shared by all its layers."""

    device: torch.device
    dtype: torch.dtype
    """Of activations and of weights that are not packed."""
    ops: Any
    """`fluentllm.kernels.ops.Ops`: the tensor operations, fast or in fixed order (deterministic mode)."""
    weight_precision: str = "float32"
    """What matrix weights are packed to after loading: one of `kernels.weights.PRECISIONS`."""
    max_positions: int = 0
    """Rotary tables need no more rows than this."""


class Model(Protocol):
    """A loaded network."""

    spec: ModelSpec

    def weight_slots(self) -> Iterator[WeightSlot]: ...

    def finalize(self) -> None:
        """After loading: pack, fuse, free what is no longer needed."""
        ...

    def matrices(self) -> list[Any]:
        """Its packed matrices (`fluentllm.kernels.weights.Weight`)."""
        ...

    def nbytes(self) -> int:
        """Bytes that its weights take on the device."""
        ...

    def forward(self, batch: Batch, attention: AttentionBackend) -> Tensor:
        """Hidden states after the final norm, [T, hidden]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] → [R, vocab] float32."""
        ...


class ModelFamily(Protocol):
    """One architecture: reads its config, builds its network."""

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """Raises `CheckpointError` for what it cannot honour (a rope scaling it does not know, by name)."""
        ...

    def build(self, config: Mapping[str, Any], context: BuildContext) -> Model: ...


# --------------------------------------------------------------------------------------------------------------- attention
@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What `supports` and the factory of an attention backend are asked about."""

    model: ModelSpec
    device: str
    """`cpu`, `cuda`."""
    dtype: str
    kv_dtype: str
    page_size: int
    deterministic: bool


@dataclass(frozen=True, slots=True)
class AttentionContext:
    spec: AttentionSpec
    pool: KVPool
    settings: Settings


class AttentionBackend(Protocol):
    """Writes KV to the pool's pages and attends over them. `layer` counts KV layers, 0 … kv.layers - 1.

    A backend whose decode neither waits for the device nor depends on lengths that only the host knows says so by
    `capturable = True`: decode programs are then captured in CUDA graphs.
    """

    capturable: bool = False

    def begin(self, batch: Batch) -> None:
        """Once a forward pass, before its first layer: plan what all layers share."""
        ...

    def gqa(self, layer: int, q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float) -> Tensor:
        """q [T, H, D], k [T, Hkv, D], v [T, Hkv, Dv], rotary applied → [T, H, Dv]."""
        ...

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
        """q_nope [T, H, nope], q_rope [T, H, rope], latent [T, C] (normed, scaled), k_rope [T, rope] (rotary applied),
        up_k [H, nope, C], up_v [H, Dv, C] (the two halves of kv_b) → [T, H, Dv]. The backend chooses the absorbed or the
        expanded form."""
        ...


class FusedGQA(AttentionBackend):
    """A backend that takes the QKV product as it comes; derive from it to be given it. Layers ask with `isinstance`."""

    @abstractmethod
    def gqa_from_product(
        self,
        layer: int,
        qkv: Tensor,
        heads: int,
        rope: tuple[Tensor, Tensor],
        batch: Batch,
        scale: float,
        *,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        interleaved: bool,
    ) -> Tensor:
        """`gqa` from qkv [T, (H + 2 Hkv) · D]: norms of queries and keys (weights [D], or neither), rotary (`rope` are cos and
        sin of the rows, as `layers.rotary.Rotary.rows` gives them) and the KV write are the backend's → [T, H, D]."""
        ...


class FusedMLA(AttentionBackend):
    """The same for MLA, in two calls around the query's up projection."""

    @abstractmethod
    def mla_append(
        self,
        layer: int,
        down: Tensor,
        q_weight: Tensor | None,
        kv_weight: Tensor,
        rope: tuple[Tensor, Tensor],
        batch: Batch,
        *,
        eps: float,
        latent_scale: float,
        interleaved: bool,
    ) -> Tensor | None:
        """down [T, Q + C + R], of the down projections: query latent (Q = 0 without `q_weight` [Q]), KV latent, rotary key.
        Norms (kv_weight [C]), scale of the KV latent, rotary and the KV write → the normed query latent [T, Q], or None."""
        ...

    @abstractmethod
    def mla_from_query(
        self,
        layer: int,
        q: Tensor,
        rope: tuple[Tensor, Tensor],
        up_k: Tensor,
        up_v: Tensor,
        batch: Batch,
        scale: float,
        *,
        interleaved: bool,
    ) -> Tensor:
        """q [T, H, nope + rope], not rotated yet, which may be overwritten; after `mla_append` of the layer → [T, H, Dv]."""
        ...


# -------------------------------------------------------------------------------------------------------------- speculation
@dataclass(frozen=True, slots=True)
class DraftMemory:
    """What a proposer keeps for the tokens of the KV pool; counted when the pool is planned."""

    kv_layers: int = 0
    """Layers of the pool behind the target's, of the same shape: the pass to `AttentionBackend` as layers kv.layers and up."""
    bytes_per_page: int = 0
    """Tensors of its own, for each page."""


@dataclass(frozen=True, slots=True)
class ProposerContext:
    """What a proposer is made from."""

    settings: Settings
    model: Model
    tables: SlotTables
    attention: AttentionBackend
    max_drafts: int
    pages: int = 0
    """Usable pages of the KV pool; their numbers are 1 … pages, and 0 is scratch."""
    dtype: str = "float32"
    """Of hidden states."""


class ProposerFactory(Protocol):
    """What `fluent_proposers` registers: a callable. It is asked `supports(model spec)` before anything is allocated. A
    factory with an attribute `memory` is asked for it then too; others keep nothing in the pool."""

    memory: Callable[[ModelSpec, int], DraftMemory]
    """(the target, bytes of one value of a hidden state) → what it keeps."""

    def __call__(self, context: ProposerContext) -> Proposer: ...


class Proposer(Protocol):
    """Drafts tokens that the next step verifies. Part of the step program: device tensors in and out, and no waiting for the
    device. A draft is right if it is the token that the target draws itself, so nothing here can change an answer."""

    def draft(self, batch: Batch, hidden: Tensor, slots: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Called after every pass of the target, once its tokens are in the slot tables.

        batch: the pass, prefill or decode; hidden [T, hidden]: of its rows, after the final norm; slots [B] int64: those that
        got tokens (none after a prompt's chunk but the last); count ≥ 0: drafts wanted. Keeps the proposer's own state up to
        date for all rows, and returns drafts [B, count] int64, valid token ids, and how many of each row are worth verifying,
        [B] int64. A row at position p of slot s became part of the history if p < tables.length[s]; rows of slots that had
        finished before write to page 0 (`batch.kv_rows`). One that raises, or returns other shapes, is switched off for good.
        """
        ...


# --------------------------------------------------------------------------------------------------------------- observers
@dataclass(frozen=True, slots=True)
class RequestEvent:
    """A request's life, for observers. `scheduled` comes again when a preempted request comes back."""

    kind: Literal["queued", "scheduled", "first_token", "finished"]
    id: str
    time: float
    """Seconds, monotonic clock."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """finished: reason, prompt_tokens, cached_tokens, generated_tokens."""
