"""The front-end process imports no torch, no Transformers, and not the package it reads GGUF headers without."""

from __future__ import annotations

import subprocess
import sys


def test_the_front_end_stays_light() -> None:
    code = """
import sys
import fluentllm.frontend.app, fluentllm.frontend.services, fluentllm.frontend.gguf_tokenizer
import fluentllm.plugins.api_openai.routes
print(*sorted({"torch", "transformers", "gguf", "numpy"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_the_plugin_itself_is_lighter() -> None:
    code = """
import sys
import fluentllm.plugins.api_openai
print(*sorted({"starlette", "msgspec", "jinja2", "tokenizers"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
