"""FluentLLM: an LLM serving engine built as an asyncio microkernel whose every capability is a plugin.

    from fluentllm import LLM, SamplingOptions
    print(LLM("smollm2").generate("The capital of France is")[0].text)

Importing this package is cheap: nothing heavy is loaded until `LLM` is touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingOptions", "__version__"]

if TYPE_CHECKING:
    from .llm import LLM, SamplingOptions


def __getattr__(name: str) -> Any:
    if name in ("LLM", "SamplingOptions"):
        from . import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'fluentllm' has no attribute {name!r}")
