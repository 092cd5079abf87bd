"""Through the whole engine: greedy tokens and their log-probabilities are Transformers', also where a prompt's beginning comes
from the prefix cache and where a long prompt is computed in chunks beside others that decode."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
import torch
from expert_oracle import make_expert_oracle
from oracle import TOLERANCE
from test_deepseek import CONFIGS as DEEPSEEK
from test_llama import CONFIGS as LLAMA
from test_longcat import BIAS, CONFIGS as LONGCAT
from test_longcat_ngram import lite  # noqa: F401 - a fixture
from test_qwen import CONFIGS as QWEN

from fluentllm.assembly import build_engine
from fluentllm.core import config
from fluentllm.core.plugins import PluginManager
from fluentllm.core.types import Outputs, Request, RequestOutput, SamplingParams
from fluentllm.hub import resolve

if TYPE_CHECKING:
    from pathlib import Path

    from oracle import Oracle

NEW = 6
SETTINGS: dict[str, Any] = {
    "engine.device": "cpu",
    "engine.threads": 1,
    "model.weight_precision": "float32",
    "kv.page_size": 4,
    "kv.memory": "4MiB",
    "scheduler.prefill_tokens": 16,
    "scheduler.max_running": 8,
}


async def serve(folder: Path, batches: list[list[list[int]]]) -> list[list[RequestOutput]]:
    """Send the prompts batch by batch → all outputs of each request, joined in one."""
    settings = config.load(None, SETTINGS, {}).settings
    engine = build_engine(settings, resolve(str(folder)), PluginManager.load({"engine", "executor"}, allow=[], deny=[]))
    queue: asyncio.Queue[RequestOutput] = asyncio.Queue()

    def deliver(message: Any) -> None:
        assert isinstance(message, Outputs), message
        for output in message.outputs:
            queue.put_nowait(output)

    running = asyncio.create_task(engine.run())
    connection = engine.connect(deliver)
    answers: list[list[RequestOutput]] = []
    for prompts in batches:
        joined = {str(i): RequestOutput(id=str(i), logprobs=[]) for i in range(len(prompts))}
        for number, prompt in enumerate(prompts):
            params = SamplingParams(max_tokens=NEW, temperature=0.0, logprobs=0, ignore_eos=True)
            connection.submit(Request(id=str(number), prompt=prompt, params=params))
        live = set(joined)
        while live:
            output = await asyncio.wait_for(queue.get(), 60)
            whole = joined[output.id]
            whole.tokens += output.tokens
            whole.logprobs += output.logprobs or []
            whole.cached_tokens = max(whole.cached_tokens, output.cached_tokens)
            if output.finish_reason is not None:
                live.discard(output.id)
        answers.append(list(joined.values()))
    connection.close()
    engine.stop()
    await running
    return answers


def compare(oracle: Oracle, prompt: list[int], answer: RequestOutput) -> None:
    logits = oracle.logits([*prompt, *answer.tokens])[len(prompt) - 1 : -1]
    assert answer.tokens == logits.argmax(-1).tolist()
    expected = logits.log_softmax(-1)[torch.arange(NEW), answer.tokens]
    found = torch.tensor([logprob.logprob for logprob in answer.logprobs or []])
    assert float((found - expected).abs().max() / logits.abs().max()) <= TOLERANCE


async def check_through_the_engine(oracle: Oracle) -> None:
    first, second, third = oracle.tokens
    again = [*first[:17], *third]
    answers = await serve(oracle.folder, [[first], [again, second, first, third * 3]])
    assert answers[0][0].cached_tokens == 0
    assert answers[1][0].cached_tokens >= 16
    assert answers[1][2].cached_tokens >= 20
    for prompt, answer in zip([first, again, second, first, third * 3], [*answers[0], *answers[1]], strict=True):
        compare(oracle, prompt, answer)


KINDS = {
    "llama": LLAMA["llama"],
    **{kind: QWEN[kind] for kind in ("qwen2", "qwen3", "qwen3_moe")},
    **{f"deepseek_{kind}": DEEPSEEK[kind] for kind in ("v2_lite", "v2", "v3")},
    **{f"longcat_{kind}": LONGCAT[kind] for kind in ("flash", "lite")},
}


@pytest.mark.parametrize("kind", KINDS)
async def test_tokens_and_logprobs_are_transformers(kind: str, tmp_path: Path) -> None:
    await check_through_the_engine(make_expert_oracle(KINDS[kind](), tmp_path, BIAS))


async def test_ngrams(lite: Oracle) -> None:  # noqa: F811
    await check_through_the_engine(lite)
