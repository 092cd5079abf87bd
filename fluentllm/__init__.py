"""FluentLLM: an LLM serving engine built as an asyncio microkernel whose every capability is a plugin.

    from fluentllm import LLM, SamplingOptions
    print(LLM("smollm2").generate("The capital of France is")[0].text)

Importing this package is cheap: nothing heavy is loaded until `LLM` is touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingOptions", "__version__", "structured"]

if TYPE_CHECKING:
    from .frontend import structured
    from .llm import LLM, SamplingOptions


def __getattr__(name: str) -> Any:
    if name in ("LLM", "SamplingOptions"):
        from . import llm

        return getattr(llm, name)
    if name == "structured":
        from .frontend import structured

        return structured
    raise AttributeError(f"module 'fluentllm' has no attribute {name!r}")
