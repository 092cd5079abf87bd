"""Continue some prompts, and answer a question, with the engine in this process. Usage: python offline.py [MODEL]"""

from __future__ import annotations

import sys

from fluentllm import LLM, SamplingOptions
from fluentllm.core.errors import InvalidRequest

PROMPTS = ["The capital of France is", "Water boils at", "Once upon a time"]


def main() -> None:
    with LLM(*sys.argv[1:2]) as llm:
        for prompt, answer in zip(PROMPTS, llm.generate(PROMPTS, SamplingOptions(max_tokens=16, temperature=0)), strict=True):
            print(f"{prompt!r} → {answer.text!r} ({answer.finish_reason})")
        try:
            [answer] = llm.chat([{"role": "user", "content": "What is the capital of France?"}], SamplingOptions(temperature=0))
        except InvalidRequest as error:  # a model without a chat template
            print(error)
        else:
            print(answer.text)


if __name__ == "__main__":
    main()
