"""`examples/train_eagle`, whole at toy size: what it writes has the public layout of EAGLE-3."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine.harness import Harness
from safetensors.torch import load_file

from .tiny_gguf import HIDDEN, write_tiny_gguf

ROOT = Path(__file__).parents[2]
DRAFT_VOCAB = 512


def train(model: Path, out: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "examples.train_eagle", "--model", str(model), "--out", str(out), "--tiny"]
    command += ["--device", "cpu", "--shard-mb", "0.04", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    stored = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(str(file))
    return stored


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The head's folder, and what was printed."""
    folder = tmp_path_factory.mktemp("eagle")
    return folder / "smollm2-eagle3", train(write_tiny_gguf(folder / "tiny.gguf"), folder)


def test_the_layout_is_the_public_one(trained: tuple[Path, str]) -> None:
    index = json.loads((trained[0] / "model.safetensors.index.json").read_text())
    stored = {}
    for name in set(index["weight_map"].values()):
        stored |= load_file(str(trained[0] / name))
    assert stored.keys() == index["weight_map"].keys()
    heads, kv, inner = HIDDEN, HIDDEN // 2, 64
    shapes = {
        "fc.weight": (HIDDEN, 3 * HIDDEN),
        "midlayer.input_layernorm.weight": (HIDDEN,),
        "midlayer.hidden_norm.weight": (HIDDEN,),
        "midlayer.post_attention_layernorm.weight": (HIDDEN,),
        "midlayer.self_attn.q_proj.weight": (heads, 2 * HIDDEN),
        "midlayer.self_attn.k_proj.weight": (kv, 2 * HIDDEN),
        "midlayer.self_attn.v_proj.weight": (kv, 2 * HIDDEN),
        "midlayer.self_attn.o_proj.weight": (HIDDEN, heads),
        "midlayer.mlp.gate_proj.weight": (inner, HIDDEN),
        "midlayer.mlp.up_proj.weight": (inner, HIDDEN),
        "midlayer.mlp.down_proj.weight": (HIDDEN, inner),
        "norm.weight": (HIDDEN,),
        "lm_head.weight": (DRAFT_VOCAB, HIDDEN),
        "d2t": (DRAFT_VOCAB,),
        "t2d": (600,),
    }
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == shapes
    assert {str(t.dtype) for name, t in stored.items() if name.endswith("weight")} == {"torch.bfloat16"}
    ids = torch.arange(DRAFT_VOCAB) + stored["d2t"]
    assert ids.tolist() == stored["t2d"].nonzero().flatten().tolist()
    config = json.loads((trained[0] / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert (config["draft_vocab_size"], config["vocab_size"], config["num_hidden_layers"]) == (DRAFT_VOCAB, 600, 1)


def test_it_goes_on_with_a_head(trained: tuple[Path, str], tmp_path: Path) -> None:
    """One step more, on other answers: the same tokens, weights close by."""
    model = trained[0].parent / "tiny.gguf"
    train(model, tmp_path, "--start", str(trained[0]), "--seed", "1", "--steps", "1", "--rate", "1e-5")
    before, after = tensors(trained[0]), tensors(tmp_path / "smollm2-eagle3")
    assert torch.equal(before["d2t"], after["d2t"])
    moved = (before["fc.weight"].float() - after["fc.weight"].float()).abs().max()
    assert 0 < moved < 2e-3


def test_it_answers_as_the_engine_does_and_reports_what_the_head_is_worth(trained: tuple[Path, str]) -> None:
    assert re.search(r"prompts held out.*: mean accepted length at K = 3, greedy: [1-4]\.", trained[1]), trained[1]
    again = [float(share) for share in re.findall(r"of which ([0-9.]+)% are the target's choice again", trained[1])]
    assert len(again) == 2
    assert min(again) > 99


def test_prompts_held_out_are_about_other_things(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from examples.train_eagle.prompts import held_out, prompts
    from examples.train_eagle.topics import THINGS, TOPICS

    ours, theirs = prompts(3000, 0, held=False), prompts(300, 0, held=True)
    assert len(set(ours)) == 3000
    assert len(set(theirs)) == 300
    assert not set(ours) & set(theirs)
    assert all(held_out(text) for text in theirs)
    kept = [topic for topic in TOPICS if held_out(topic)]
    assert len(kept) > len(TOPICS) / 32
    assert not [text for text in ours for topic in kept if re.search(rf"What is {topic}\?", text)]
    assert [text for text in theirs for thing in THINGS if thing in text]


async def test_the_engine_drafts_with_it(trained: tuple[Path, str], tmp_path: Path) -> None:
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    settings = {"model.load_format": "auto", "engine.deterministic": True, "speculative.model": str(trained[0])}
    harness = Harness(model, **settings, **{"speculative.method": "eagle", "speculative.k": 3})
    prompts = [[5, 6, 7, 8], [9, 10, 11], list(range(20, 60))]
    answers = []
    for method in ("none", "eagle"):
        async with harness.engine(**{"speculative.method": method}) as running:
            ids = [running.submit(prompt, max_tokens=24, ignore_eos=True) for prompt in prompts]
            answers.append([await running.rest(i) for i in ids])
            stats = running.engine.stats().speculative
    assert answers[0] == answers[1]
    assert stats is not None
    assert stats.error is None
    assert stats.drafted[2] > 0


def test_answers_are_the_likeliest_tokens_at_each_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step by step over a cache, padded in front, beside the whole text at once; rows at a temperature go their own way."""
    monkeypatch.syspath_prepend(str(ROOT))
    from examples.train_eagle.answers import Writer
    from examples.train_eagle.target import Target

    target = Target(write_tiny_gguf(tmp_path / "tiny.gguf"), torch.device("cpu"), torch.float32)
    prompts = torch.randint(2, 600, (5, 40)).tolist()
    prompts = [prompt[: 1 + 9 * i] for i, prompt in enumerate(prompts)]
    writer = Writer(target, 5, 40, 80, ends=(1,), sampled=2)
    once, again = writer(prompts), writer(prompts)
    assert once[2:] == again[2:]
    assert once[:2] != again[:2]
    for prompt, answer in zip(prompts[2:], once[2:], strict=True):
        assert len(answer) == 80 or answer[-1] == 1
        _, final = target.states(torch.tensor([prompt + answer]))
        logits = (final[0] @ target.head.T)[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
        # Another order of sums may swap two that are as likely.
        assert bool((chosen >= logits.max(-1).values - 1e-3).all())


def test_units_change_nothing_but_the_scale_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from examples.train_eagle.head import Head, Shape

    head = Head(Shape(600, 64, 32, 64, 4, 2, 8, 10000.0, 1e-5, 512), torch.arange(0, 600, 9)[:64])
    words, states = torch.randn(3, 9, 32), torch.randn(3, 9, 96) * torch.logspace(-2, 2, 96)
    before = head(words, states, 3)
    head.measure_units(states.flatten(0, 1))
    assert head.units.max() / head.units.min() > 100
    for one, other in zip(before, head(words, states, 3), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((states / head.units).square().mean((0, 1)), torch.ones(96), rtol=1e-4, atol=1e-4)


def test_prompts_like_those_held_out_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from examples.train_eagle.prompts import held_out, prompts, resembles_held_out, written

    assert all(resembles_held_out(text) for text in written())
    assert resembles_held_out("Please tell me: what is the capital of France, and why?")
    assert not resembles_held_out("What is the difference between a fork and a spoon?")
    assert held_out("vaccines")
    assert not [text for text in prompts(3000, 0, held=False) if resembles_held_out(text)]
