"""The default model, whole: its greedy text is Transformers', and `fluent serve` answers the openai client with Paris.

Skipped where the model is neither in the cache nor to be had from the package index.
"""

from __future__ import annotations

import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from fluentllm import LLM, SamplingOptions
from fluentllm.core.errors import FluentError
from fluentllm.hub import resolve

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at",
    "1, 2, 3, 5, 8,",
    "The three primary colours are red,",
    "Dear Sir or Madam,\n\nI am writing to",
    "Q: Why is the sky blue?\nA:",
    "Die Hauptstadt von Deutschland ist",
    "x" * 40,
]
NEW = 24


@pytest.fixture(scope="module")
def file() -> Path:
    try:
        return resolve("smollm2").path
    except FluentError as error:
        pytest.skip(f"the default model is not here: {error}")


def transformers_model(file: Path) -> PreTrainedModel:
    """Read by Transformers' own reader of GGUF. (`from_pretrained` would need another package for it.)"""
    read = load_gguf_checkpoint(str(file), return_tensors=False)
    with torch.device("meta"):
        empty = LlamaForCausalLM(LlamaConfig(**read["config"]))
    tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=empty)["tensors"]
    model = LlamaForCausalLM(LlamaConfig(**read["config"])).eval()
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied to the embeddings
    return model


@pytest.mark.usefixtures("quick_gguf")
@torch.inference_mode()
def test_greedy_text_is_transformers(file: Path) -> None:
    """Each of our tokens is the likeliest for Transformers after the ones before it: so its greedy text is ours."""
    exact = {"model.weight_precision": "float32", "model.dtype": "float32", "engine.device": "cpu", "kv.memory": "1GiB"}
    with LLM("smollm2", settings=exact) as llm:
        answers = llm.generate(PROMPTS, SamplingOptions(max_tokens=NEW, temperature=0, ignore_eos=True))
        tokenizer = llm._local.generation.tokenizer
    theirs = transformers_model(file)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        tokens = tokenizer.encode(prompt, add_special_tokens=True)
        logits = theirs(torch.tensor([[*tokens, *answer.tokens]])).logits[0, len(tokens) - 1 : -1]
        assert answer.tokens == logits.argmax(-1).tolist(), prompt


class Served:
    """`fluent serve`, until its banner is there."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "fluentllm.cli", "serve", "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        lines: queue.Queue[str] = queue.Queue()
        assert self.process.stdout is not None
        threading.Thread(target=lambda out: [lines.put(line) for line in out], args=(self.process.stdout,), daemon=True).start()
        said = ""
        while "Ctrl-C" not in said:
            said += lines.get(timeout=120)
        found = re.search(r"http://\S+/v1\b", said)
        assert found, said
        self.url = found[0]


@pytest.fixture(scope="module")
def served(file: Path) -> Iterator[Served]:
    server = Served("--device", "cpu", "--kv-memory", "512MiB")
    yield server
    server.process.terminate()
    assert server.process.wait(30) == 0


def test_the_openai_client_gets_paris_whole_and_streamed(served: Served) -> None:
    messages: list = [{"role": "user", "content": "What is the capital of France?"}]
    with openai.OpenAI(base_url=served.url, api_key="none", timeout=60, max_retries=0) as client:
        whole = client.chat.completions.create(model="smollm2", messages=messages, temperature=0)
        text = whole.choices[0].message.content
        assert "Paris" in text
        streamed = client.chat.completions.create(model="smollm2", messages=messages, temperature=0, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == text
