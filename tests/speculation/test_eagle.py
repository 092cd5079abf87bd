"""`eagle` drafts what its layer computes from the whole history, wherever its KV came from; bad drafts are refused at start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from engine.harness import Harness, write_tiny_llama

from fluentllm.assembly import assemble
from fluentllm.core.errors import ConfigError, FluentError
from fluentllm.core.kv.pool import KVPool
from fluentllm.core.types import KVSpec

from .eagle import DRAFT_VOCAB, HIDDEN, VOCAB, Reference, draft_tensors, harness, write_draft
from .pressure import Case, under_pressure, work
from .watching import Drafted, unchanged, watched

if TYPE_CHECKING:
    from pathlib import Path

KV = KVSpec(kind="gqa", layers=1, heads=2, head_dim=16, v_head_dim=16)


def page_bytes(model: Harness) -> int:
    return model.page_bytes(8) + KVPool.bytes_per_page(KV, 8, torch.float32) + 4 * HIDDEN


@pytest.fixture(
    scope="module",
    params=[("eagle", "llama"), ("eagle3", "llama"), ("eagle", "deepseek_v3"), ("eagle3", "longcat")],
    ids="-".join,
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    kind, target = request.param
    model = harness(tmp_path_factory.mktemp(f"{kind}-{target}"), kind, target)
    return Case(model, Reference(model.loaded.model, kind), page_bytes(model))


@pytest.mark.parametrize(("k", "depth"), [(5, 1), (2, 2), (3, 0)])
async def test_drafts_and_tokens_under_pressure(case: Case, k: int, depth: int) -> None:
    await under_pressure(case, "eagle", k, depth)


async def test_fast_arithmetic_drafts_the_same(tmp_path: Path) -> None:
    """Not in deterministic mode, where other code attends: the drafts are those of the reference, up to rounding."""
    model = harness(tmp_path, "eagle3", "llama", **{"engine.deterministic": False, "model.weight_precision": "float32"})
    record: list[Drafted] = []
    settings = {"speculative.method": "watched", "speculative.k": 4, "scheduler.prefill_tokens": 16}
    async with model.engine(plugins=watched("eagle", record, unchanged), **settings) as running:
        for tokens in ([5], work()[2][0], work()[2][0]):
            await running.tokens(tokens, **work()[2][1])
    reference = Reference(model.loaded.model, "eagle3")
    assert sum(drafted.check(reference) for drafted in record) > 0.9 * sum(len(drafted.drafts) for drafted in record) > 50


def test_the_pool_holds_the_draft_layer_only_where_it_drafts(case: Case) -> None:
    engine = assemble(case.model.settings(), "tiny", case.model.loaded, case.model.plugins)
    engine.executor.close()
    size = engine.info.memory["kv_pool"] / (engine.info.kv_tokens + engine.info.page_size)
    assert size == case.page_bytes / 8


async def test_random_weights(tmp_path: Path) -> None:
    """As speed is measured: a folder with a config.json is enough for `load_format: dummy`."""
    draft = write_draft(tmp_path / "draft", "eagle3")
    (draft / "model.safetensors").unlink()
    settings = {"speculative.method": "eagle", "speculative.model": str(draft), "speculative.k": 3}
    model = Harness(write_tiny_llama(tmp_path / "target"), **settings)
    async with model.engine(**{"speculative.method": "none"}) as running:
        expected = await running.tokens([3, 4, 5], max_tokens=12, ignore_eos=True)
    async with model.engine() as running:
        assert await running.tokens([3, 4, 5], max_tokens=12, ignore_eos=True) == expected
        assert running.engine.stats().speculative.drafted[2] > 0


# --------------------------------------------------------------------------------------------------------------- other layouts
@pytest.mark.parametrize("rename", [("midlayer.", "layers.0."), ("", "model."), "pytorch_model.bin"])
async def test_names_that_other_tools_write(tmp_path: Path, rename: tuple[str, str] | str) -> None:
    """Of tensors, or of the file: the papers' heads are pickled."""
    own = draft_tensors("eagle3")
    file, rename = (rename, ("midlayer.", "layers.0.")) if isinstance(rename, str) else ("", rename)
    renamed = {name.replace(*rename, 1) if name not in ("d2t", "t2d", "lm_head.weight") else name: t for name, t in own.items()}
    assert renamed.keys() != own.keys()
    drafted = []
    for number, tensors in enumerate((own, renamed)):
        draft = write_draft(tmp_path / str(number), "eagle3", tensors)
        if file and number:
            (draft / "model.safetensors").unlink()
            torch.save(tensors, draft / file)
        settings = {"speculative.method": "eagle", "speculative.model": str(draft)}
        model = Harness(write_tiny_llama(tmp_path / f"target{number}"), **settings)
        record: list[Drafted] = []
        async with model.engine(
            plugins=watched("eagle", record, unchanged), **{"speculative.method": "watched", "speculative.k": 2}
        ) as running:
            await running.tokens([3, 4, 5], max_tokens=12, ignore_eos=True)
        drafted.append([d.drafts for d in record])
    assert drafted[0] == drafted[1]
    assert any(drafted[0])


@pytest.mark.parametrize(
    ("config", "taps"),
    [
        ({}, (2, 6, 9)),
        ({"eagle_aux_hidden_state_layer_ids": [1, 5, 12]}, (1, 5, 12)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 5, 8], "use_aux_hidden_state": True}}, (2, 6, 9)),
    ],
)
def test_which_hidden_states_are_fused(tmp_path: Path, config: dict[str, Any], taps: tuple[int, ...]) -> None:
    from fluentllm.core.types import ModelSpec
    from fluentllm.plugins.spec_eagle.config import parse

    spec = ModelSpec(
        architecture="A", vocab_size=VOCAB, hidden_size=HIDDEN, layers=12, heads=4, max_position=64, kv=KV
    )  # fmt: skip
    changes = {"eagle_aux_hidden_state_layer_ids": None, **config}
    assert parse(write_draft(tmp_path, "eagle3", **changes), spec).taps == taps


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
async def test_states_that_overflow_draft_in_vain(tmp_path: Path, kind: str) -> None:
    """What a draft model computes is NaN: answers are the target's, and nothing is read or written out of bounds."""
    tensors = draft_tensors(kind)
    tensors["fc.weight"] = torch.full_like(tensors["fc.weight"], 3e38)
    draft = write_draft(tmp_path / "broken", kind, tensors)
    model = harness(tmp_path, kind, "llama", **{"speculative.model": str(draft), "speculative.k": 3})
    jobs: list[dict[str, Any]] = [{}, {"temperature": 0.9, "seed": 5}, {"temperature": 0.9, "seed": 5, "top_p": 0.8}]
    found = []
    for method in ("none", "eagle"):
        async with model.engine(**{"speculative.method": method}) as running:
            ids = [running.submit([9, 8, 7, i], max_tokens=20, ignore_eos=True, **job) for i, job in enumerate(jobs)]
            found.append([await running.rest(i) for i in ids])
            stats = running.engine.stats().speculative
    assert found[0] == found[1]
    assert stats is not None
    assert stats.error is None
    assert stats.drafted[2] > 0


# -------------------------------------------------------------------------------------------------------------------- refusals
def without(*names: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in draft_tensors("eagle3").items() if name not in names}


def holding_nan() -> dict[str, torch.Tensor]:
    return {**draft_tensors("eagle3"), "norm.weight": torch.full((HIDDEN,), torch.nan)}


def beyond() -> dict[str, torch.Tensor]:
    return {**draft_tensors("eagle3"), "d2t": torch.full((DRAFT_VOCAB,), VOCAB)}


BAD: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor] | None, str]] = {
    "hidden": ({"hidden_size": 96, "head_dim": 16}, None, "for a target of hidden size 96; this one's is 64"),
    "vocabulary": ({"vocab_size": 128}, None, "for a target of vocabulary 128; this one's is 160"),
    "layers": ({"num_hidden_layers": 2}, None, "has 2 layers: an EAGLE draft has one"),
    "kind": ({"model_type": "qwen3"}, None, "is of the kind 'qwen3'"),
    "taps": ({"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}, None, r"layers \[1, 2, 3\]; the target has 2 layers"),
    "default taps": ({"eagle_aux_hidden_state_layer_ids": None}, None, "the target has 2 layers"),
    "missing": ({}, without("fc.weight", "norm.weight"), r"2 missing: .*fc\.weight \[64, 192\]"),
    "no d2t": ({}, without("d2t"), r"1 missing: d2t \[70\]"),
    "d2t": ({}, beyond(), "d2t .* does not lead to 70 different tokens"),
    "NaN": ({}, holding_nan(), r"norm\.weight \[64\] holds 64 values that are NaN"),
    "misshapen": ({"intermediate_size": 81}, None, "3 misshapen"),
    "no layers": ({"num_hidden_layers": None}, None, "has no 'num_hidden_layers'"),
    "no heads": ({"num_attention_heads": 0}, None, "num_attention_heads is 0, not a whole number of 1 or more"),
    "heads": ({"num_key_value_heads": 3}, None, "4 heads cannot share 3 key-value heads evenly"),
    "words": ({"draft_vocab_size": 161}, None, "draft_vocab_size 161 is more than vocab_size 160"),
    "rope": ({"rope_scaling": {"rope_type": "longrope"}}, None, "asks for rope scaling 'longrope', which is not supported"),
    "rope is a word": ({"rope_scaling": "linear"}, None, "rope_scaling is 'linear', not an object"),
    "no factor": ({"rope_scaling": {"type": "linear"}}, None, "'linear' needs factor, a positive number; found None"),
    "factor": ({"rope_scaling": {"type": "yarn", "factor": "4"}}, None, "'yarn' needs factor, a positive number; found '4'"),
    "beta": ({"rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": -1}}, None, "'yarn' needs beta_fast"),
    "theta": ({"rope_theta": -1}, None, "needs rope_theta, a positive number; found -1"),
    "part": ({"partial_rotary_factor": [0.5]}, None, r"needs partial_rotary_factor, a positive number; found \[0.5\]"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_drafts_are_refused_at_start(tmp_path: Path, bad: str) -> None:
    config, tensors, said = BAD[bad]
    draft = write_draft(tmp_path / "draft", "eagle3", tensors, **config)
    with pytest.raises(ConfigError, match=said) as raised:
        start(tmp_path, draft)
    assert raised.value.param == "speculative.model"
    assert raised.value.fix
    assert str(draft) in str(raised.value)


def start(folder: Path, draft: Any, **settings: Any) -> None:
    target = write_tiny_llama(folder / "target")
    # Not the default model, which brings a head of its own.
    chosen = {"model.name": str(target), "speculative.method": "eagle", "speculative.model": draft and str(draft), **settings}
    model = Harness(target, **chosen)
    assemble(model.settings(), "tiny", model.loaded, model.plugins).executor.close()


def test_no_draft_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs a draft model that was trained for this target\. Set speculative\.model \("):
        start(tmp_path, None)
    with pytest.raises(FluentError, match=r"speculative\.model: There is no model at './nowhere'"):
        start(tmp_path, "./nowhere")


def test_k_beyond_the_limit(tmp_path: Path) -> None:
    draft = write_draft(tmp_path / "draft", "eagle3")
    with pytest.raises(ConfigError, match=r"k is 6, and max_k 4: use auto or 0 … 4, or raise max_k \(at most 7\)"):
        start(tmp_path, draft, **{"speculative.k": 6})
    with pytest.raises(ConfigError, match=r"speculative\.k is 99: Expected `int` <= 7"):
        start(tmp_path, draft, **{"speculative.k": 99})
    with pytest.raises(ConfigError, match=r"speculative\.max_k"):
        start(tmp_path, draft, **{"speculative.max_k": 9})


def test_bad_drafts_are_refused_before_the_target_is_loaded(tmp_path: Path) -> None:
    """Its config is enough: the target's weights are not even there."""
    draft = write_draft(tmp_path / "draft", "eagle3", rope_scaling={"type": "llama3", "factor": 8})
    target = write_tiny_llama(tmp_path / "target")
    chosen = {"model.name": str(target), "speculative.method": "eagle", "speculative.model": str(draft)}
    with pytest.raises(ConfigError, match=r"The draft model at .*draft: .*'llama3' needs low_freq_factor"):
        Harness(target, **{"model.load_format": "safetensors"}, **chosen)


def test_another_tokenizer(tmp_path: Path) -> None:
    import json

    def tokenizer(folder: Path, *words: str) -> None:
        vocab = {word: number for number, word in enumerate(words)}
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": words[0]}
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))

    draft = write_draft(tmp_path / "draft", "eagle3")
    tokenizer(tmp_path / "target", "a", "b", "c")
    tokenizer(draft, "a", "b", "c")
    start(tmp_path, draft)
    tokenizer(draft, "a", "c", "b")
    with pytest.raises(ConfigError, match=r"tokenizer of the draft model at .* is not the target's: 2 tokens differ"):
        start(tmp_path, draft)


def test_a_default_may_bring_its_draft_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from fluentllm.hub import DEFAULTS, resolve_draft

    draft = write_draft(tmp_path / "draft", "eagle3")
    monkeypatch.setitem(DEFAULTS, "smollm2", replace(DEFAULTS["smollm2"], drafts={"eagle": draft}))
    found = resolve_draft(None, "smollm2", "eagle")
    assert found is not None
    assert found.path == draft
    assert resolve_draft(None, "smollm2", "pld") is None
    assert resolve_draft(None, str(tmp_path), "eagle") is None
    other = write_draft(tmp_path / "other", "eagle3")
    chosen = resolve_draft(str(other), "smollm2", "eagle")
    assert chosen is not None
    assert chosen.path == other
