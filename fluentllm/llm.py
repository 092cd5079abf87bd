"""The offline API: a model in this process, text in and text out.

llm = LLM("smollm2")
[answer] = llm.generate("The capital of France is", SamplingOptions(max_tokens=8, temperature=0))
[answer] = llm.chat([{"role": "user", "content": "What is the capital of France?"}])
print(answer.text)
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .frontend.generation import Completion
from .frontend.messages import chat_of
from .frontend.sampling import SamplingOptions, check_options

Prompt = str | list[int]
Message = Mapping[str, Any]


class LLM:
    """A loaded model. Close it, or use it in a `with` statement, to free its memory.

    `model`: what `fluent serve` takes; left out, the one that `config` names, or else the small default model. `settings` are
    dotted keys of the settings tree (`{"engine.deterministic": True}`), over those of the file `config`.
    Raises `FluentError` subclasses for what cannot be loaded.
    """

    def __init__(
        self, model: str | None = None, *, config: Path | None = None, settings: Mapping[str, Any] | None = None
    ) -> None:
        import os

        from .core.config import load
        from .local import LocalEngine

        named = {} if model is None else {"model.name": model}
        loaded = load(config, {**(settings or {}), **named}, os.environ)
        self._local = LocalEngine(loaded.settings)
        # Also at interpreter exit, so that no task of the engine is left pending.
        self._finalizer = weakref.finalize(self, self._local.close)

    def generate(self, prompts: Prompt | Sequence[Prompt], options: SamplingOptions | None = None) -> list[Completion]:
        """Continue each prompt (text or token ids): one completion a prompt and choice, in order.

        Raises `InvalidRequest`, `ContextTooLong`.
        """
        several = [prompts] if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)) else prompts
        return self._local.call(self._generate(list(several), check_options(options or SamplingOptions())))  # type: ignore[arg-type]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        options: SamplingOptions | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Completion]:
        """Answer a conversation, or several: one completion a conversation and choice, in order.

        `tools`, in OpenAI's form, are shown to the model. What it writes to call one is left in the completion's text, as its
        reasoning is; markers that are special tokens are in its `tokens` only. `chat_template_kwargs`: variables of the chat
        template. Raises `InvalidRequest`, `ContextTooLong`.
        """
        several = [messages] if messages and isinstance(messages[0], Mapping) else messages
        checked = check_options(options or SamplingOptions())
        return self._local.call(self._chat(list(several), checked, tools, chat_template_kwargs))  # type: ignore[arg-type]

    def close(self) -> None:
        self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def _generate(self, prompts: list[Prompt], options: SamplingOptions) -> list[Completion]:
        generation = self._local.generation
        tokens = [await generation.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        return await self._complete(tokens, options)

    async def _chat(
        self,
        conversations: list[Sequence[Message]],
        options: SamplingOptions,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
    ) -> list[Completion]:
        generation = self._local.generation
        chats = [chat_of(messages, generation.template) for messages in conversations]
        tokens = [await generation.encode_chat(chat, tools=tools, variables=variables) for chat in chats]
        return await self._complete(tokens, options)

    async def _complete(self, prompts: list[list[int]], options: SamplingOptions) -> list[Completion]:
        """However many there are: no more at once than the engine's queue holds."""
        generation, choices = self._local.generation, options.n or 1
        size = max(1, self._local.settings.scheduler.max_waiting // choices)
        done: list[Completion] = []
        for start in range(0, len(prompts), size):
            part = await generation.complete(generation.job(prompts[start : start + size], options))
            for completion in part:
                completion.index += start * choices
            done += part
        return done
