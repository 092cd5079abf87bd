"""Kernels compiled ahead: what is recorded without memory is what a GPU would launch, and each kind is compiled once."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch
from engine.harness import write_tiny_llama
from kernels.triton.hopper_driver import Hopper
from triton.runtime import driver

from fluentllm import prewarm
from fluentllm.assembly.kernels import launches_of
from fluentllm.core import config
from fluentllm.core.plugins import PluginManager
from fluentllm.core.protocols import BuildContext
from fluentllm.core.timeline import Timeline
from fluentllm.hub import load_config, resolve
from fluentllm.kernels import choose_ops
from fluentllm.prewarm import Prewarm, key_of, shortened

MODELS = Path(__file__).parents[1] / "benchmarks" / "gpu" / "models"
SMALL = {"num_hidden_layers": 2, "num_layers": 2, "n_routed_experts": 8, "vocab_size": 500}
SOME = {
    "_embedding_kernel",
    "_rms_norm_kernel",
    "_commit_kernel",
    "_publish_kernel",
    "_rows_kernel",
    "_draw_kernel",
    "_threshold_kernel",
}
PREFILL = {"_prefill_kernel", "_merge_runs_kernel"}
GROUPED, LATENT = PREFILL | {"_decode_kernel"}, PREFILL | {"decode_bf16_few"}


def small(folder: Path, name: str, **changes: int) -> Path:
    """The geometry of a model that benchmarks use, with few layers."""
    given = json.loads((MODELS / name / "config.json").read_text())
    folder.mkdir()
    smaller = {key: size for key, size in {**SMALL, **changes}.items() if key in given}
    (folder / "config.json").write_text(json.dumps({**given, **smaller}))
    return folder


def recorded(folder: Path, monkeypatch: pytest.MonkeyPatch, **overrides: object) -> list:
    """As if on an H100, of which only its number is asked."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    settings = config.load(None, {"scheduler.max_running": 8, **overrides}, {}).settings
    files, device = resolve(str(folder), weights=False), torch.device("cuda", 0)
    plugins = PluginManager.load({"engine", "executor"}, allow=[])
    given = load_config(files)
    family = plugins.registry("models").get(given["architectures"][0]).factory
    context = BuildContext(device, torch.bfloat16, choose_ops(device, False), "bfloat16", family.spec(given).max_position + 16)
    with torch.inference_mode():
        steps = list(launches_of(settings, plugins, family, given, context, files.path))
    assert all(steps)
    return [launch for step in steps for launch in step]


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("llama-3.1-8b", GROUPED),
        ("qwen3-0.6b", GROUPED),
        ("deepseek-v3-lite", LATENT),
        ("longcat-flash-lite", LATENT),
    ],
)
def test_every_family_can_be_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, kernels: set[str]
) -> None:
    with caplog.at_level(logging.ERROR):
        launches = recorded(small(tmp_path / name, name), monkeypatch)
    assert caplog.records == []
    names = {launch.kernel.__name__ for launch in launches}
    assert SOME | kernels <= names
    distinct = {key_of(launch) for launch in launches}
    assert len(distinct) < len(launches) / 2


@pytest.mark.parametrize("name", ["qwen3-0.6b", "deepseek-v3-lite", "longcat-flash-lite"])
def test_few_layers_launch_what_all_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Norms are shared out between a layer and the next, so one layer of a kind is not enough: the second reads what the first
    left."""
    folder = small(tmp_path / name, name, num_hidden_layers=5, num_layers=4)

    def layers(launches: list) -> int:
        return sum(launch.kernel.__name__ in {"_decode_kernel", "decode_bf16_few"} for launch in launches)

    few = recorded(folder, monkeypatch)
    monkeypatch.setattr(prewarm, "thin", lambda model: None)
    every = recorded(folder, monkeypatch)
    assert layers(few) < layers(every)
    assert set(map(key_of, few)) == set(map(key_of, every))


@pytest.mark.parametrize("seed", range(20))
def test_fewer_layers_begin_end_and_follow_each_other_as_all_do(seed: int) -> None:
    rng = random.Random(seed)
    kinds = [rng.choice("abc"[: rng.randint(1, 3)]) for _ in range(rng.randint(0, 40))]
    kept = shortened(kinds)
    assert kept == sorted(set(kept))
    borders = [set(pairwise(["", *row, ""])) for row in (kinds, [kinds[i] for i in kept])]
    assert borders[0] == borders[1]
    assert len(kept) <= 20
    assert [shortened("a" * n) for n in (1, 2, 30)] == [[0], [0, 1], [28, 29]]


def test_an_fp8_cache_is_recorded_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """MLA's by kernels of its own, and none of those over 16 bits; that of grouped heads by the same ones."""
    with caplog.at_level(logging.ERROR):
        latent = recorded(small(tmp_path / "mla", "deepseek-v3-lite"), monkeypatch, **{"kv.dtype": "fp8"})
        grouped = recorded(small(tmp_path / "gqa", "qwen3-0.6b"), monkeypatch, **{"kv.dtype": "fp8"})
    assert caplog.records == []
    names = {launch.kernel.__name__ for launch in latent}
    assert SOME | {"_append_norms", "_fetch", "_quantise_query", "decode_fp8_few"} | PREFILL <= names
    assert not {"decode_bf16", "decode_bf16_few"} & names
    assert {launch.kernel.__name__ for launch in grouped} >= SOME | GROUPED


def test_drafts_are_recorded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Each number of drafts is a program of its own; a proposer that failed would have been logged."""
    with caplog.at_level(logging.ERROR):
        alone = recorded(small(tmp_path / "a", "deepseek-v3-lite"), monkeypatch)
        drafting = recorded(
            small(tmp_path / "b", "deepseek-v3-lite"), monkeypatch, **{"speculative.method": "mtp", "speculative.max_k": 2}
        )
    assert caplog.records == []

    def rows(launches: list) -> set[int]:
        return {launch.options["ROWS"] for launch in launches if launch.kernel.__name__ == "_rows_kernel"}

    assert (rows(alone), rows(drafting)) == ({1}, {1, 2, 3})
    assert "_leave_kernel" in {launch.kernel.__name__ for launch in drafting}


def test_one_that_is_given_up_ends_and_lists_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_active", Hopper())
    going = threading.Event()

    def steps() -> Iterator[list]:
        while True:
            going.set()
            yield []

    prewarm = Prewarm()
    prewarm.start(steps, torch.device("cpu"), Timeline("engine"))
    going.wait()
    prewarm.give_up()
    assert prewarm.compiled == 0
    assert not any(thread.name in ("fluent-prewarm", "fluent-compiled") for thread in threading.enumerate())
    assert not psutil.Process().children()


FAKE_DRIVER = """
    import logging, sys, time
    import torch
    from kernels.triton.hopper_driver import Hopper
    from triton.runtime import driver

    driver.set_active(Hopper())
    import triton
    from fluentllm.kernels.triton.elementwise import silu_mul
    from fluentllm.kernels.triton.launch import recording
    from fluentllm.prewarm import Compiler

    compiled = []
    triton.knobs.compilation.listener = lambda **about: compiled.append(about["cache_hit"])
    with recording() as launches:
        for tokens in (1, 8, 8, 8):
            silu_mul(torch.empty(tokens, 2 * 512, dtype=torch.bfloat16, device="meta"))
    logging.basicConfig(level="INFO")
    with Compiler(torch.device("cpu"), 2) as compiler:
        compiler.add(launches)
    print(compiler.count, sum(not hit for hit in compiled), sum(compiled))
"""


def test_each_kind_is_compiled_once_and_kept(tmp_path: Path) -> None:
    """Through Triton's own `warmup`, for a GPU that is not here; a second process finds it in the cache."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    code = textwrap.dedent(FAKE_DRIVER)

    def run() -> list[int]:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        assert "is compiled when it is launched" not in done.stderr
        return [int(number) for number in done.stdout.split()]

    # One kind. What a process of its own has compiled, this one finds in a file.
    assert run() == [1, 0, 1]


@pytest.mark.gpu
def test_a_first_request_compiles_nothing(tmp_path: Path) -> None:
    """In a process of its own with an empty cache: after the start, neither prompt nor answer wait for a compiler."""
    write_tiny_llama(tmp_path / "tiny", hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    code = f"""
        import triton
        from fluentllm import LLM
        from fluentllm.frontend.sampling import SamplingOptions

        kinds = []

        def note(**about):
            source, options = about["src"], about["metadata"]
            facts = {{f"type of {{name}}": kind for name, kind in source.signature.items()}}
            facts |= {{f"constant {{place}}": value for place, value in source.constants.items()}}
            facts |= {{f"attribute {{place}}": value for place, value in source.attrs.items()}}
            facts |= {{name: options[name] for name in ("num_warps", "num_stages", "launch_pdl")}}
            kinds.append((source.name, facts))

        triton.knobs.compilation.listener = note
        settings = {{"model.load_format": "dummy", "engine.device": "cuda"}}
        with LLM({str(tmp_path / "tiny")!r}, settings=settings) as llm:
            ahead = len(kinds)
            for prompts in ([[5] * 5], [[5] * 9, [7] * 70], [[9] * 33] * 8):
                llm.generate(prompts, SamplingOptions(max_tokens=20, temperature=0, ignore_eos=True))
                llm.generate(prompts, SamplingOptions(max_tokens=20, temperature=1, top_p=0.9, ignore_eos=True))
        print(ahead, "kinds were compiled ahead,", len(kinds) - ahead, "by requests")
        for name, facts in kinds[ahead:]:
            print(name, "was not compiled ahead; those that were differ in:")
            for other in (facts_ahead for named, facts_ahead in kinds[:ahead] if named == name):
                print("  ", {{n: (other.get(n), facts.get(n)) for n in other.keys() | facts if other.get(n) != facts.get(n)}})
    """
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.stdout.endswith(" 0 by requests\n"), done.stdout + done.stderr
