"""Small models of every kind, of random weights, in the shapes that the GPU's kernels are made for."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fluentllm.core.config import load
from fluentllm.core.types import Request, SamplingParams
from fluentllm.frontend.client import EngineClient
from fluentllm.local import LocalEngine

SHAPES = Path(__file__).parents[2] / "benchmarks" / "gpu" / "models"
VOCABULARY = 1000
SMALL: dict[str, dict[str, int]] = {
    "qwen3-0.6b": {"num_hidden_layers": 2, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2},
    "llama-3.1-8b": {
        "num_hidden_layers": 2,
        "intermediate_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    "deepseek-v3-lite": {
        "num_hidden_layers": 3,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "n_routed_experts": 16,
        "q_lora_rank": 128,
    },
    "longcat-flash-lite": {
        "num_layers": 2,
        "ffn_hidden_size": 512,
        "expert_ffn_hidden_size": 128,
        "n_routed_experts": 16,
        "zero_expert_num": 8,
        "q_lora_rank": 128,
        "num_attention_heads": 16,
    },
}


def small(name: str, folder: Path, **changes: Any) -> Path:
    config = json.loads((SHAPES / name / "config.json").read_text())
    config |= {"vocab_size": VOCABULARY, "hidden_size": 256, "max_position_embeddings": 4096, **SMALL[name], **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@contextmanager
def engine(folder: Path, **settings: Any) -> Iterator[LocalEngine]:
    """An engine that runs inside, and whose proposer must not have been dropped: steps without one are other steps."""
    given = {"model.name": str(folder), "model.load_format": "dummy", "kv.memory": "1GiB", **settings}
    with LocalEngine(load(None, given, {}).settings) as local:
        yield local
        assert local.engine.executor.programs.drafting_error is None


def prompts(count: int, longest: int, seed: int = 3) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCABULARY) for _ in range(rng.randint(1, longest))] for _ in range(count)]


async def tokens_of(client: EngineClient, prompt: list[int], number: int, temperature: float, budget: int = 40) -> list[int]:
    params = SamplingParams(
        max_tokens=budget, temperature=temperature, seed=number, ignore_eos=True, top_p=0.9 if number % 2 else 1.0
    )
    found: list[int] = []
    async for output in client.submit(Request(id=f"request-{number}", prompt=prompt, params=params)):
        found += output.tokens
    return found
