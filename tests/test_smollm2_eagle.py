"""The EAGLE-3 head in the package, on the model that it was trained for: drafts are those of the network as it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fluentllm import LLM, SamplingOptions
from fluentllm.core.errors import FluentError
from fluentllm.frontend.tokenizer import load_tokenizer
from fluentllm.hub import DEFAULTS, resolve

ROOT = Path(__file__).parents[1]
SETTINGS: dict[str, Any] = {
    "engine.device": "cpu",
    "engine.threads": 1,  # two wait for each other where other tests run on the same cores: eight times as long
    "model.weight_precision": "float32",
    "kv.memory": "512MiB",
    "speculative.method": "eagle",
    "speculative.k": 3,
    "speculative.max_k": 3,
}
PROMPTS = 4
NEW = 32
ACCEPTED_LENGTH = 1.7
"""At least; `benchmarks/speculation/acceptance.py` measures more prompts."""


def test_it_is_small_and_has_a_card() -> None:
    folder = DEFAULTS["smollm2"].drafts["eagle"]
    assert sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= 24_000_000
    assert "Apache-2.0" in (folder / "MODEL.md").read_text()


@torch.inference_mode()
def test_its_drafts_are_the_trained_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is the target's own, and as many drafts are right as by the network that was trained."""
    monkeypatch.syspath_prepend(str(ROOT))
    from examples.drafting import mean_accepted_length
    from examples.train_eagle.__main__ import encode
    from examples.train_eagle.head import load
    from examples.train_eagle.target import Target

    try:
        path = resolve("smollm2").path
    except FluentError as error:
        pytest.skip(f"the default model is not here: {error}")
    target = Target(path, torch.device("cpu"), torch.float32)
    folder = DEFAULTS["smollm2"].drafts["eagle"]
    head = load(folder)
    tokenizer = load_tokenizer(path)
    asked = encode(tokenizer, (ROOT / "examples/train_eagle/heldout.txt").read_text().splitlines()[:PROMPTS])
    with LLM("smollm2", settings=SETTINGS) as llm:
        answers = llm.generate(asked, SamplingOptions(max_tokens=NEW, temperature=0))
    drafted, expected = [], []
    for prompt, answer in zip(asked, answers, strict=True):
        told = [*answer.tokens, *tokenizer.eos_ids[:1]] if answer.finish_reason == "stop" else answer.tokens
        tokens = torch.tensor([[*prompt, *told]])
        states, final = target.states(tokens)
        assert told == (final[0, len(prompt) - 1 : -1] @ target.head.T).argmax(-1).tolist()
        words = F.embedding(tokens, target.embedding)
        rows = head(words, states, 3)
        matches = torch.stack([head.kept[head.lm_head(row[0]).argmax(-1)][:-1] == tokens[0, 1:] for row in rows])
        expected.append(mean_accepted_length(matches.unsqueeze(0), [len(prompt)], [tokens.shape[1]]))
        count = len(told) - 1
        drafted.append(count / (count - answer.accepted))
    assert drafted == pytest.approx(expected)
    assert sum(drafted) / PROMPTS >= ACCEPTED_LENGTH
