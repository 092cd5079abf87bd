"""Which attention backends a start takes: by name, in order, by what was measured; and who gets a pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from fluentllm.assembly.attention import attention_for, candidates, described, records
from fluentllm.assembly.attention.choice import choose, comparable
from fluentllm.assembly.attention.passes import FusedPhasedAttention, Order, PhasedAttention, phased
from fluentllm.assembly.attention.records import Measurement, keep, recall
from fluentllm.assembly.attention.timing import Bench, points
from fluentllm.core.batch import Batch
from fluentllm.core.buckets import CAPTURED_KEYS
from fluentllm.core.errors import ConfigError
from fluentllm.core.handoff import watched
from fluentllm.core.kv.pool import KVPool
from fluentllm.core.plugins.registry import Entry, Registry
from fluentllm.core.protocols import (
    AttentionBackend,
    AttentionContext,
    AttentionSpec,
    PartialAttention,
    PassPlan,
    PlannedPrefill,
)
from fluentllm.core.settings import AttentionSettings, Settings
from fluentllm.core.types import KVSpec, ModelSpec
from fluentllm.plugins.attn_torch.backend import TorchAttention

CPU = torch.device("cpu")
KV = KVSpec(kind="gqa", layers=1, heads=2, head_dim=16, v_head_dim=16)
SPEC = AttentionSpec(
    model=ModelSpec(architecture="x", vocab_size=9, hidden_size=64, layers=1, heads=4, max_position=64, kv=KV),
    device="cpu",
    dtype="float32",
    kv_dtype="float32",
    page_size=16,
    deterministic=False,
)


class Late(TorchAttention, PartialAttention):
    """The plain backend, but for passes that it does not serve yet."""

    capturable = True
    loaded = ready = False

    def load(self) -> None:
        self.loaded = True

    def serves(self, batch: Batch) -> bool:
        return self.ready


class Sure(TorchAttention):
    capturable = True


class Plugins:
    """The part of a plugin manager that is asked."""

    def __init__(self, **entries: Any) -> None:
        self._registry = Registry("attention", "attention backend", "attention.backend")
        for name, (factory, supports) in entries.items():
            self._registry.add(Entry(name, factory, f"plugin_{name}", f"plugin_{name} 1.0", supports))

    def registry(self, kind: str) -> Registry:
        assert kind == "attention"
        return self._registry


def yes(spec: AttentionSpec) -> str | None:
    return None


def prefill_only(spec: AttentionSpec) -> str | None:
    return "it decodes nothing" if "decode" in spec.phases else None


PLUGINS: Any = Plugins(torch=(TorchAttention, yes), late=(Late, prefill_only), triton=(Sure, yes), another=(Sure, yes))


def settings(backend: str = "auto", prefill: str | None = None) -> Settings:
    return Settings(attention=AttentionSettings(backend=backend, prefill_backend=prefill))


def names(entries: list[Entry]) -> list[str]:
    return [entry.name for entry in entries]


def test_unmeasured_order_is_fixed_and_the_plain_one_comes_last() -> None:
    assert names(candidates(settings(), SPEC, PLUGINS, "prefill")) == ["triton", "another", "late", "torch"]
    assert names(candidates(settings(), SPEC, PLUGINS, "decode")) == ["triton", "another", "torch"]


def test_a_named_one_comes_first_and_others_do_what_it_leaves() -> None:
    assert names(candidates(settings("another"), SPEC, PLUGINS, "decode")) == ["another", "triton", "torch"]
    by_phase = settings("triton", "late")
    assert names(candidates(by_phase, SPEC, PLUGINS, "prefill"))[0] == "late"
    assert names(candidates(by_phase, SPEC, PLUGINS, "decode"))[0] == "triton"
    assert comparable(by_phase, candidates(by_phase, SPEC, PLUGINS, "decode"), "decode") == []


def test_one_that_cannot_is_refused_with_its_reason_and_the_setting() -> None:
    with pytest.raises(ConfigError, match="cannot serve this model in decode: it decodes nothing") as caught:
        candidates(settings("late"), SPEC, PLUGINS, "decode")
    assert caught.value.param == "attention.backend"
    assert names(candidates(settings("late"), SPEC, PLUGINS, "decode", or_any=True))[0] == "triton"
    with pytest.raises(ConfigError, match="No plugin offers") as unknown:
        candidates(settings("triton", "nobody"), SPEC, PLUGINS, "prefill")
    assert unknown.value.param == "attention.prefill_backend"
    nobody: Any = Plugins(late=(Late, prefill_only))
    with pytest.raises(ConfigError, match="late: it decodes nothing"):
        candidates(settings(), SPEC, nobody, "decode")


def pool() -> KVPool:
    made = KVPool(KV, 40, 16, torch.float32, CPU)
    made.k.normal_()
    made.v.normal_()
    return made


def test_one_backend_alone_is_given_as_it_is() -> None:
    made = attention_for(settings("triton"), SPEC, pool(), PLUGINS, 64)
    assert type(made) is Sure


def test_a_prefill_backend_of_its_own_leaves_decode_alone() -> None:
    made = attention_for(settings("triton", "late"), SPEC, pool(), PLUGINS, 64)
    assert isinstance(made, PhasedAttention)
    assert made.capturable
    late, behind = made.prefill.backends
    assert isinstance(late, Late)
    assert late.loaded
    assert type(behind) is Sure
    assert made.decode.backends == [behind]


def bench() -> Bench:
    return Bench(settings(), SPEC, CPU, points("decode", 64) + points("prefill", 64))


def test_passes_go_to_the_first_that_serves_them_and_agree() -> None:
    made = attention_for(settings("triton", "late"), SPEC, pool(), PLUGINS, 64)
    late, sure = made.prefill.backends
    decode, prefill = (bench().batch(points(phase, 64)[0]) for phase in ("decode", "prefill"))  # type: ignore[arg-type]
    for ready, batch, expected in ((False, prefill, sure), (True, prefill, late), (True, decode, sure)):
        late.ready = ready
        made.begin(batch)
        assert made._current is expected
        rows = batch.positions.shape[0]
        q, k, v = torch.randn(rows, 4, 16), torch.randn(rows, 2, 16), torch.randn(rows, 2, 16)
        out = made.gqa(0, q, k, v, batch, 0.25)
        expected.begin(batch)
        torch.testing.assert_close(out, expected.gqa(0, q, k, v, batch, 0.25))


def test_a_twin_that_is_watched_has_passes_of_its_own() -> None:
    made = attention_for(settings("triton", "late"), SPEC, pool(), PLUGINS, 64)
    seen: list[int] = []

    class Watcher:
        def layer(self, layer: int) -> None:
            seen.append(layer)

    twin = watched(made, Watcher())  # type: ignore[arg-type]
    batch = bench().batch(points("prefill", 64)[0])
    twin.begin(batch)
    rows = batch.positions.shape[0]
    twin.gqa(0, torch.randn(rows, 4, 16), torch.randn(rows, 2, 16), torch.randn(rows, 2, 16), batch, 0.25)
    assert seen == [0]


def test_a_wrapper_that_hands_on_can_be_watched() -> None:
    """What a plugin's backend does not define itself it may leave to the one inside by `__getattr__`."""
    seen: list[int] = []

    class Wrapper:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return getattr(self.inner, name)

    class Watcher:
        def layer(self, layer: int) -> None:
            seen.append(layer)

    twin = watched(Wrapper(attention_for(settings("torch"), SPEC, pool(), PLUGINS, 64)), Watcher())  # type: ignore[arg-type]
    batch = bench().batch(points("prefill", 64)[0])
    twin.begin(batch)
    rows = batch.positions.shape[0]
    out = twin.gqa(0, torch.randn(rows, 4, 16), torch.randn(rows, 2, 16), torch.randn(rows, 2, 16), batch, 0.25)
    assert (out.shape, seen) == ((rows, 4, 16), [0])


def test_fused_calls_are_offered_where_all_take_them() -> None:
    from fluentllm.plugins.attn_flashinfer.backend import FlashInferAttention
    from fluentllm.plugins.attn_flashinfer.compiling import Modules
    from fluentllm.plugins.attn_triton.backend import TritonAttention

    context = AttentionContext(SPEC, pool(), Settings())
    triton, flashinfer = TritonAttention(context), FlashInferAttention(context, Modules([], "9.0a"))
    assert type(phased(Order([flashinfer, triton]), Order([triton]))) is FusedPhasedAttention
    assert type(phased(Order([flashinfer, TorchAttention(context)]), Order([triton]))) is PhasedAttention
    with pytest.raises(ValueError, match="every pass"):
        Order([flashinfer])


class Planned(TorchAttention, PlannedPrefill):
    def plan_prefill(self, batch: Batch) -> PassPlan | None:
        return PassPlan("all alike", "its own")

    def begin(self, batch: Batch) -> None:
        self.begun = batch.plan


@pytest.mark.parametrize(
    ("keys", "named", "taken"),
    [(CAPTURED_KEYS, False, True), (CAPTURED_KEYS + 1, False, False), (CAPTURED_KEYS, True, False)],
)
def test_over_short_contexts_who_can_be_captured_goes_first(keys: int, named: bool, taken: bool) -> None:
    context = AttentionContext(SPEC, pool(), Settings())
    better, captured = Late(context), Planned(context)
    better.ready = True
    made = phased(Order([better, captured], named=named), Order([captured]))
    assert isinstance(made, PlannedPrefill)
    batch = bench().batch(points("prefill", 64)[0])
    batch.kv_lengths_host = (keys,)
    batch.plan = made.plan_prefill(batch)
    assert (batch.plan is not None) == taken
    if batch.plan is not None:
        made.begin(batch)
        assert made._current is captured  # type: ignore[attr-defined]
        assert captured.begun.plan == "its own"
    alone = phased(Order([captured]), Order([better, captured]))
    assert isinstance(alone, PlannedPrefill)
    assert alone.plan_prefill(batch) is not None, "nobody is better"


def test_what_was_waited_for_is_compared_once_when_it_is_there() -> None:
    late, sure = (attention_for(settings("triton", "late"), SPEC, pool(), PLUGINS, 64)).prefill.backends  # type: ignore[attr-defined]
    asked: list[int] = []

    def again() -> list[AttentionBackend]:
        asked.append(1)
        return [late, sure]

    order = Order([sure], [late], again)
    batch = bench().batch(points("prefill", 64)[0])
    assert [order.pick(batch), asked] == [sure, []]
    late.ready = True
    assert [order.pick(batch), order.pick(batch), asked] == [late, late, [1]]


def test_a_comparison_that_fails_leaves_the_order(caplog: pytest.LogCaptureFixture) -> None:
    late, sure = (attention_for(settings("triton", "late"), SPEC, pool(), PLUGINS, 64)).prefill.backends  # type: ignore[attr-defined]
    late.ready = True

    def again() -> list[AttentionBackend]:
        raise RuntimeError("out of memory")

    order = Order([sure], [late], again)
    assert order.pick(bench().batch(points("prefill", 64)[0])) is sure
    assert "could not be compared" in caplog.text


# ---------------------------------------------------------------------------------------------------------------- measured
FACTS = {"gpu": "NVIDIA H100", "attention": "gqa"}


def measured(**changes: Any) -> Measurement:
    times = {"1 × 1024": {"a": 4.0, "b": 5.0}, "32 × 1024": {"a": 90.0, "b": 60.0}, "8 × 8192": {"a": 1.0}}
    made = Measurement(of=FACTS, phase="decode", taken="2026-01-01 00:00", backends=["a", "b"], times=times)
    return msgspec.structs.replace(made, **changes)


def test_the_order_is_by_all_points_that_both_have() -> None:
    assert measured().order() == ["b", "a"]
    even = {"1": {"a": 2.0, "b": 1.0}, "2": {"a": 1.0, "b": 2.0}}
    assert measured(times=even).order() == ["a", "b"]
    assert "32 × 1024: b 60, a 90 µs" in measured().described()


def test_a_measurement_is_found_for_just_what_it_was_taken_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUENT_CACHE", str(tmp_path))
    assert recall(FACTS, "decode") is None
    keep(measured())
    assert recall(FACTS, "decode") == measured()
    assert recall(FACTS, "prefill") is None
    assert recall(FACTS | {"gpu": "NVIDIA H200"}, "decode") is None
    (file,) = (tmp_path / "kernels" / "attention").iterdir()
    file.write_text("{")
    assert recall(FACTS, "decode") is None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels").write_text("a file in the way")
    monkeypatch.setenv("FLUENT_CACHE", str(tmp_path))
    keep(measured())


def test_points_keep_to_the_longest_sequence() -> None:
    assert [str(point) for point in points("decode", 2048)] == ["1 × 1024", "32 × 1024"]
    assert [str(point) for point in points("decode", 64)] == ["1 × 64"]
    assert [str(point) for point in points("prefill", 4096)] == ["512 after 0", "2048 after 0"]


def test_the_chosen_order_comes_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the same backends were measured before, nothing runs: on this machine it could not."""
    monkeypatch.setenv("FLUENT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    entries = comparable(settings(), candidates(settings(), SPEC, PLUGINS, "decode"), "decode")
    assert names(entries) == ["triton", "another"]
    facts = records.facts(replace(SPEC, phases=("decode",)), entries, CPU, 64)
    assert facts["gpu"] == "NVIDIA H100 80GB HBM3"
    keep(measured(of=facts, backends=["another", "triton"], times={"1 × 64": {"another": 1.0, "triton": 2.0}}))
    assert names(choose(settings(), SPEC, entries, "decode", CPU, 64)) == ["another", "triton"]
    # One alone is not compared.
    assert names(choose(settings(), SPEC, entries[:1], "decode", CPU, 64)) == ["triton"]


def test_doctor_tells_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUENT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    cuda = torch.device("cuda")
    assert described(settings(), SPEC, PLUGINS, CPU, 64)["decode"] == ("triton", "")
    assert described(settings("another"), SPEC, PLUGINS, cuda, 64)["decode"] == ("another", "as set (attention.backend)")
    before = described(settings(), SPEC, PLUGINS, cuda, 64)["decode"]
    assert before == ("triton", "not compared yet: a start does, once kernels are compiled")
    entries = comparable(settings(), candidates(settings(), SPEC, PLUGINS, "decode"), "decode")
    facts = records.facts(replace(SPEC, phases=("decode",)), entries, cuda, 64)
    keep(measured(of=facts, backends=["another", "triton"], times={"1 × 64": {"another": 1.0, "triton": 2.0}}))
    used, why = described(settings(), SPEC, PLUGINS, cuda, 64)["decode"]
    assert used == "another"
    assert "measured on 2026-01-01 00:00 UTC, µs a layer: 1 × 64: another 1, triton 2 µs" in why
