"""The backend `torch` against attention written out row by row, over hand-built pages: GQA and MLA, prefill and decode, ragged,
chunked, with the window that follows running sequences, without, and by the C kernels."""

from __future__ import annotations

import pytest
import torch
from native_kernels import native_library
from torch import Tensor

from fluentllm.core.batch import Batch
from fluentllm.core.kv.pool import KVPool
from fluentllm.core.protocols import AttentionBackend, AttentionContext, AttentionSpec
from fluentllm.core.settings import Settings
from fluentllm.core.types import KVSpec, ModelSpec
from fluentllm.kernels.attention_reference import gqa_reference, mla_reference
from fluentllm.kernels.native.library import Library
from fluentllm.plugins.attn_torch import plugin, window as windows

PAGE, LENGTH, LAYERS, HEADS, SCALE = 4, 60, 2, 6, 0.3
GQA = KVSpec(kind="gqa", layers=LAYERS, heads=2, head_dim=16, v_head_dim=16)
MLA = KVSpec(kind="mla", layers=LAYERS, latent_dim=24, rope_dim=8)
NOPE, VALUE = 12, 10
LIBRARY: Library | None = None
"""What `Case` gives the backend; the fixture `window` may set it."""


class Case:
    """Sequences with all their rows drawn beforehand, so that a pass is told by (sequence, start, count) alone."""

    def __init__(
        self, kv: KVSpec, sequences: int, *, deterministic: bool = False, kv_dtype: torch.dtype = torch.float32
    ) -> None:
        self.kv = kv
        pages = sequences * -(-LENGTH // PAGE)
        self.pool = KVPool(kv, pages, PAGE, kv_dtype, torch.device("cpu"))
        for tensor in (self.pool.k, self.pool.v, self.pool.latent):
            tensor.copy_(torch.randn(tensor.shape))
        self.table = (torch.randperm(pages) + 1).to(torch.int32).view(sequences, -1)
        self.history = torch.randint(0, 1000, (sequences, LENGTH), dtype=torch.int32)
        model = ModelSpec(
            architecture="", vocab_size=1000, hidden_size=8, layers=LAYERS, heads=HEADS, max_position=LENGTH, kv=kv
        )
        spec = AttentionSpec(
            model=model,
            device="cpu",
            dtype="float32",
            kv_dtype=str(kv_dtype).removeprefix("torch."),
            page_size=PAGE,
            deterministic=deterministic,
        )
        factories = {}
        plugin.fluent_attention(lambda name, factory, supports: factories.setdefault(name, (factory, supports)))
        factory, supports = factories["torch"]
        assert supports(spec) is None
        self.backend: AttentionBackend = factory(AttentionContext(spec, self.pool, Settings(), LIBRARY))
        rows = sequences, LENGTH
        if kv.kind == "gqa":
            self.q = torch.randn(LAYERS, *rows, HEADS, 16)
            # What FP8 holds exactly, so that what is read back is what was given.
            self.k, self.v = torch.randn(2, LAYERS, *rows, 2, 16).to(kv_dtype if self.fp8 else torch.float32).float()
        else:
            self.q = torch.randn(LAYERS, *rows, HEADS, NOPE + 8)
            self.k = torch.randn(LAYERS, *rows, 24 + 8)
            self.up_k, self.up_v = torch.randn(HEADS, NOPE, 24) / 4, torch.randn(HEADS, VALUE, 24) / 4

    def batch(self, chunks: list[tuple[int, int, int]], *, decode: bool) -> Batch:
        counts = [count for _, _, count in chunks]
        ends = [start + count for _, start, count in chunks]
        slots = torch.tensor([sequence for sequence, _, _ in chunks], dtype=torch.int64)
        positions = torch.cat([torch.arange(0), *(torch.arange(start, start + count) for _, start, count in chunks)])
        sequences = torch.repeat_interleave(torch.arange(len(chunks)), torch.tensor(counts, dtype=torch.int64))
        table = self.table[slots]
        kv_rows = table[sequences, positions // PAGE].long() * PAGE + positions % PAGE
        starts = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return Batch(
            tokens=self.history[slots[sequences], positions].long(),
            positions=positions,
            sequences=sequences,
            slots=slots,
            query_start=starts,
            kv_lengths=torch.tensor(ends, dtype=torch.int32),
            page_table=table,
            kv_rows=kv_rows,
            history=self.history,
            page_size=PAGE,
            query_length=counts[0] if decode and counts else 1 if decode else None,
            query_lengths=None if decode else tuple(counts),
            kv_lengths_host=None if decode else tuple(ends),
        )

    def run(self, chunks: list[tuple[int, int, int]], *, decode: bool = False, live: list[int] | None = None) -> None:
        """One pass through all layers, every row compared with the reference; of each sequence the first `live` rows, if the
        others are inert."""
        batch = self.batch(chunks, decode=decode)
        counts = live or [count for _, _, count in chunks]
        kept = torch.cat([torch.arange(0), *(torch.arange(n) < some for (_, _, n), some in zip(chunks, counts, strict=True))])
        kept = kept.bool()
        batch.kv_rows = batch.kv_rows.where(kept, 0)
        self.backend.begin(batch)
        for layer in range(LAYERS):
            ours, expected = self._ours(layer, chunks, batch), self._expected(layer, chunks)
            torch.testing.assert_close(ours[kept], expected[kept], rtol=1e-4, atol=2e-5 * self.tolerance)
            assert ours.isfinite().all()

    @property
    def tolerance(self) -> float:
        return 1500.0 if self.pool.dtype is torch.bfloat16 else 1.0

    @property
    def fp8(self) -> bool:
        return self.pool.dtype is torch.float8_e4m3fn

    def _rows(self, tensor: Tensor, chunks: list[tuple[int, int, int]]) -> Tensor:
        parts = [tensor[sequence, start : start + count] for sequence, start, count in chunks]
        return torch.cat(parts) if parts else tensor[0, :0]

    def _ours(self, layer: int, chunks: list[tuple[int, int, int]], batch: Batch) -> Tensor:
        q = self._rows(self.q[layer], chunks)
        new = self._rows(self.k[layer], chunks)
        # Of an inert row anything.
        new = torch.where((batch.kv_rows < PAGE).view(-1, *[1] * (new.ndim - 1)), torch.randn_like(new), new)
        if self.kv.kind == "gqa":
            return self.backend.gqa(layer, q, new, self._rows(self.v[layer], chunks), batch, SCALE)
        latent, k_rope = new.split((24, 8), -1)
        return self.backend.mla(layer, q[..., :NOPE], q[..., NOPE:], latent, k_rope, self.up_k, self.up_v, batch, SCALE)

    def _expected(self, layer: int, chunks: list[tuple[int, int, int]]) -> Tensor:
        parts = []
        for sequence, start, count in chunks:
            positions = torch.arange(start, start + count)
            q = self.q[layer, sequence, start : start + count].double()
            known = self.k[layer, sequence].double()
            if self.kv.kind == "gqa":
                part = gqa_reference(q, known, self.v[layer, sequence].double(), positions, SCALE)
            else:
                latent, k_rope = known.split((24, 8), -1)
                up = self.up_k.double(), self.up_v.double()
                part = mla_reference(q[..., :NOPE], q[..., NOPE:], latent, k_rope, *up, positions, SCALE)
            parts.append(part.float())
        width = 16 if self.kv.kind == "gqa" else VALUE
        return torch.cat(parts) if parts else torch.empty(0, HEADS, width)


@pytest.fixture(params=["window", "gather", "native"])
def window(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "native":
        monkeypatch.setitem(globals(), "LIBRARY", native_library())
    if request.param == "gather":
        monkeypatch.setattr(windows, "MEMORY", 0)


@pytest.fixture(params=[GQA, MLA], ids=["gqa", "mla"])
def kv(request: pytest.FixtureRequest) -> KVSpec:
    return request.param


@pytest.fixture(params=[False, True], ids=["fast", "fixed order"])
def deterministic(request: pytest.FixtureRequest) -> bool:
    return request.param


def test_whole_prompts_and_chunks_side_by_side(kv: KVSpec, deterministic: bool) -> None:
    case = Case(kv, 3, deterministic=deterministic)
    case.run([(0, 0, 17), (1, 0, 1), (2, 0, 8)])
    case.run([(0, 17, 5), (1, 1, 30), (2, 8, 1)])
    case.run([])
    case.run([(2, 9, 0), (1, 31, 2)])


@pytest.mark.parametrize("rows", [1, 3])
def test_decode_of_unequal_lengths(kv: KVSpec, deterministic: bool, window: None, rows: int) -> None:
    case = Case(kv, 3, deterministic=deterministic)
    starts = [1, 13, 29]
    case.run([(s, 0, start) for s, start in enumerate(starts)])
    for step in range(8):
        case.run([(s, start + step * rows, rows) for s, start in enumerate(starts)], decode=True)


def test_decode_of_nothing(kv: KVSpec, window: None) -> None:
    Case(kv, 1).run([], decode=True)


def test_one_sequence_whose_pages_are_neighbours(kv: KVSpec) -> None:
    case = Case(kv, 1)
    case.table = torch.arange(1, case.table.numel() + 1, dtype=torch.int32).view(1, -1)
    case.run([(0, 0, 9)])
    for position in range(9, 20):
        case.run([(0, position, 1)], decode=True)


def test_sequences_come_and_go(kv: KVSpec, window: None) -> None:
    """Others join, leave and return between decode steps; the window must notice every time."""
    case = Case(kv, 4)
    length = [6, 11, 20, 3]
    case.run([(s, 0, n) for s, n in enumerate(length)])
    for group in ([0, 1], [0, 1], [0, 1, 2], [1, 2], [2, 1], [2, 1], [0], [0], [0, 1, 2, 3], [0, 1, 2, 3], [3]):
        case.run([(s, length[s], 1) for s in group], decode=True)
        for s in group:
            length[s] += 1


def test_a_prompt_that_goes_on_between_two_decode_steps(kv: KVSpec, window: None) -> None:
    case = Case(kv, 2)
    case.run([(0, 0, 10), (1, 0, 14)])
    case.run([(0, 10, 1), (1, 14, 1)], decode=True)
    case.run([(1, 15, 7)])
    case.run([(0, 11, 1), (1, 22, 1)], decode=True)


def test_a_slot_that_changes_hands(kv: KVSpec, window: None) -> None:
    """Same slot, same pages, same length, another request: its history differs, and so does its KV."""
    case = Case(kv, 2)
    case.run([(0, 0, 10), (1, 0, 10)])
    case.run([(0, 10, 1), (1, 10, 1)], decode=True)
    for tensor in (case.q, case.k, *([case.v] if kv.kind == "gqa" else [])):
        tensor[:, 0] = torch.randn_like(tensor[:, 0])
    case.history[0] = torch.randint(1000, 2000, (LENGTH,), dtype=torch.int32)
    case.run([(0, 0, 11)])
    case.run([(0, 11, 1), (1, 11, 1)], decode=True)


def test_rejected_drafts_are_written_over(kv: KVSpec, window: None) -> None:
    """A step verifies three drafts; the next begins where the first wrong one stood, with other tokens and other KV."""
    case = Case(kv, 2)
    case.run([(0, 0, 10), (1, 0, 14)])
    case.run([(0, 10, 4), (1, 14, 4)], decode=True)
    for sequence, wrong in ((0, 12), (1, 15)):
        case.history[sequence, wrong:] = torch.randint(1000, 2000, (LENGTH - wrong,), dtype=torch.int32)
        for tensor in (case.q, case.k, *([case.v] if kv.kind == "gqa" else [])):
            tensor[:, sequence, wrong:] = torch.randn_like(tensor[:, sequence, wrong:])
    case.run([(0, 12, 4), (1, 15, 4)], decode=True)
    case.run([(0, 16, 4), (1, 19, 4)], decode=True)


def test_rows_of_drafts_that_nobody_left(kv: KVSpec, deterministic: bool, window: None) -> None:
    """What stands at their positions is older than the pass, and no row that is needed sees it. Later the same tokens are
    computed in earnest, by a pass that the window does not follow."""
    case = Case(kv, 3, deterministic=deterministic)
    case.run([(0, 0, 10), (1, 0, 14), (2, 0, 7)])
    case.run([(0, 10, 4), (1, 14, 4), (2, 7, 4)], decode=True, live=[1, 4, 3])
    case.run([(0, 11, 4), (1, 18, 4), (2, 10, 4)], decode=True, live=[4, 1, 2])
    case.run([(1, 19, 3), (2, 12, 2)])
    case.run([(0, 15, 4), (1, 22, 4), (2, 14, 4)], decode=True, live=[1, 1, 1])


def test_keys_and_values_in_fewer_bits(kv: KVSpec, window: None) -> None:
    case = Case(kv, 2, kv_dtype=torch.bfloat16)
    case.run([(0, 0, 10), (1, 0, 14)])
    case.run([(0, 10, 5), (1, 14, 2)])
    for step in range(3):
        case.run([(0, 15 + step, 1), (1, 16 + step, 1)], decode=True)


def test_keys_and_values_in_eight_bits(deterministic: bool, window: None) -> None:
    case = Case(GQA, 3, deterministic=deterministic, kv_dtype=torch.float8_e4m3fn)
    case.run([(0, 0, 17), (1, 0, 1), (2, 0, 8)])
    case.run([(0, 17, 5), (1, 1, 3), (2, 8, 0)])
    case.run([])
    for step in range(3):
        case.run([(0, 22 + 2 * step, 2), (1, 4 + 2 * step, 2), (2, 8 + 2 * step, 2)], decode=True)


def test_what_eight_bits_cannot_hold_is_saturated(deterministic: bool) -> None:
    case = Case(GQA, 1, deterministic=deterministic, kv_dtype=torch.float8_e4m3fn)
    case.k[:, 0, 0], case.v[:, 0, :5] = 1e5, -1e9
    batch = case.batch([(0, 0, 5)], decode=False)
    case.backend.begin(batch)
    case._ours(0, [(0, 0, 5)], batch)
    assert torch.equal(case.pool.k[0].flatten(0, 1)[batch.kv_rows[0]].float(), torch.full((2, 16), 448.0))
    assert torch.equal(case.pool.v[0].flatten(0, 1)[batch.kv_rows].float(), torch.full((5, 2, 16), -448.0))


def test_the_window_appends_instead_of_copying(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[int] = []
    copy = windows.Window._copy
    monkeypatch.setattr(windows.Window, "_copy", lambda self, *args: copies.append(1) or copy(self, *args))
    case = Case(GQA, 2)
    case.run([(0, 0, 10), (1, 0, 14)])
    for step in range(20):
        case.run([(0, 10 + step, 1), (1, 14 + step, 1)], decode=True)
    assert len(copies) == LAYERS


def test_what_it_cannot_do_has_a_reason() -> None:
    reasons = {}
    plugin.fluent_attention(lambda name, factory, supports: reasons.setdefault(name, supports))
    model = ModelSpec(architecture="", vocab_size=1, hidden_size=1, layers=1, heads=1, max_position=1, kv=GQA)
    spec = AttentionSpec(model=model, device="cpu", dtype="float32", kv_dtype="fp8", page_size=16, deterministic=False)
    assert "fp8" in reasons["torch"](spec)
