"""Answers of the API that speculation must not change: what needs text, so the engine alone does not know it.

Each request is answered whole and streamed, beside all others, by an engine without drafts and by one with them.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from api.conftest import Api, load_services, serving
from api.tools import TEMPLATES
from frontend.checkpoints import SPECIAL, write_folder
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from fluentllm.frontend.client import LocalEngineClient

from .features import plugins_with
from .lossless import VOCAB

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from pathlib import Path

    from fluentllm.core.plugins import PluginManager
    from fluentllm.core.types import Request, RequestOutput

    from .lossless import Subject
    from .watching import Doctor

TEXT = "once and again, and once again"
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": TEXT}]}
SAMPLED: dict[str, Any] = {"temperature": 0.9}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"enum": ["again", "once"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a", "n"],
}
CALLED: dict[str, Any] = {"type": "function", "function": {"name": "again", "parameters": SCHEMA, "strict": True}}
OTHER: dict[str, Any] = {"type": "function", "function": {"name": "once"}}
TOOLS: dict[str, Any] = {**CHAT, "tools": [CALLED, OTHER], "max_tokens": 60}
NAMED: dict[str, Any] = {"type": "function", "function": {"name": "again"}}
TAG: dict[str, Any] = {"type": "tag", "begin": "<a>", "content": {"type": "regex", "pattern": "[0-9]{2}"}, "end": "</a>"}


def must_be(**what: Any) -> list[dict[str, Any]]:
    """Requests for a text that a grammar describes."""
    return [{"structured_outputs": what, "max_tokens": 30}, {"structured_outputs": what, "max_tokens": 30, **SAMPLED}]


ANSWERS: dict[str, list[dict[str, Any]]] = {
    "stop strings": [{"stop": [9]}, {"stop": [8, 12], **SAMPLED}, {**CHAT, "stop": [10]}],
    "stop strings, min_tokens": [{"stop": [3], "min_tokens": 9}],
    "n above 1": [{"n": 3, **SAMPLED}, {"n": 2, "stop": [9]}, {**CHAT, "n": 2, **SAMPLED}],
    "several prompts": [{"prompt": [TEXT, "again"], "n": 2, **SAMPLED}],
    "echo": [{"echo": True}, {"echo": True, "logprobs": 2}, {"echo": True, "logprobs": 1, "max_tokens": 0}],
    "logprobs of a chat": [{**CHAT, "logprobs": True, "top_logprobs": 3}],
    "structured outputs: JSON object": must_be(json_object=True),
    "structured outputs: JSON schema": [
        *must_be(json=SCHEMA),
        {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, "max_tokens": 30},
    ],
    "structured outputs: regular expression": must_be(regex="[a-c]{2}(on|ag)*[0-9]{3}"),
    "structured outputs: choice": must_be(choice=["once", "once again", "again"]),
    "structured outputs: grammar": must_be(grammar='root ::= "(" root ")" | [a-z] [a-z] [a-z]'),
    "structured outputs: structural tag": must_be(structural_tag={"type": "structural_tag", "format": TAG}),
    "tools: a call is required": [{**TOOLS, "tool_choice": "required"}, {**TOOLS, "tool_choice": "required", **SAMPLED}],
    "tools: a named call": [{**TOOLS, "tool_choice": NAMED, "n": 2, **SAMPLED}],
    "tools: one call at most": [{**TOOLS, "tool_choice": "required", "parallel_tool_calls": False}],
    "tools: the model decides": [{**TOOLS, "tool_choice": "auto", "max_tokens": 20}],
    "reasoning": [{**CHAT, "chat_template_kwargs": {"thinking": True}}],
}
"""Feature → requests that use it. `stop`: strings of three characters that begin at these places of the answer without them."""
PATTERNS = {
    "structured outputs: JSON object": r"\{.*\}",
    "structured outputs: JSON schema": r'\{"a":"(again|once)","n":\d{1,2}\}',
    "structured outputs: regular expression": r"[a-c]{2}(on|ag)*[0-9]{3}",
    "structured outputs: choice": "once|once again|again",
    "structured outputs: grammar": r"\(*[a-z]{3}\)*",
    "structured outputs: structural tag": r"<a>\d\d</a>",
}
"""What texts of these features are that end with `stop`."""
LENGTH = 14


@dataclass
class Answer:
    feature: str
    body: dict[str, Any]
    whole: dict[str, Any] = field(default_factory=dict)
    """Speculation off."""
    streamed: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if "messages" in self.body else "/v1/completions"

    @property
    def texts(self) -> list[str]:
        return [choice["text"] if "text" in choice else choice["message"]["content"] for choice in self.whole["choices"]]

    @property
    def reasons(self) -> list[str]:
        return [choice["finish_reason"] for choice in self.whole["choices"]]


class Recording(LocalEngineClient):
    """Keeps the tokens of each request, prompt and answer."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.texts: list[list[int]] = []

    async def submit(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        text = list(request.prompt)
        self.texts.append(text)
        async with aclosing(super().submit(request)) as outputs:
            async for output in outputs:
                text += output.tokens
                yield output


def write_tokenizer(folder: Path) -> None:
    """ASCII and what is frequent in calls, beside a model of so few tokens; the end of sequence is the model's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=[chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"],
        show_progress=False,
    )
    call = '<tool_call>\n{"name": "again", "arguments": {"a": "once", "n": 12}}\n</tool_call>'
    tools = '<tools>[{"type": "function", "function": {"name": "once", "parameters": {"type": "object", "properties":'
    tokenizer.train_from_iterator([call, tools, TEXT], trainer)
    assert tokenizer.get_vocab_size() == VOCAB
    write_folder(folder, tokenizer, eos_token=SPECIAL[2], chat_template=TEMPLATES["hermes"])


@asynccontextmanager
async def served(subject: Subject, plugins: PluginManager, **settings: Any) -> AsyncIterator[tuple[Api, Recording]]:
    """The subject's model behind the API."""
    folder = subject.model.loaded.path
    if not (folder / "tokenizer.json").exists():
        write_tokenizer(folder)
    given = {
        "model.max_model_len": 480,
        "scheduler.max_running": 12,
        "grammar.states": 8,
        "plugins.grammar_xgrammar.max_whitespace": 0,
        **settings,
    }
    async with subject.model.engine(plugins=plugins, **given) as running:
        client = Recording(running.engine)
        services = load_services(subject.model.settings(**given), client, folder)
        async with serving(services, running.engine) as api:
            yield api, client
        client.close()


async def answered(subject: Subject) -> tuple[list[Answer], list[list[int]]]:
    """All requests, with their answers when nothing is drafted, and the tokens that right drafts are made of: of longer answers
    first, which no stop string ends."""
    made = []
    for feature, bodies in ANSWERS.items():
        for chosen in bodies:
            common = {"max_tokens": LENGTH, "temperature": 0.0, "seed": len(made)}
            prompt = {} if "messages" in chosen else {"prompt": TEXT}
            made.append(Answer(feature, {**common, **prompt, **chosen}))
    off = {"speculative.method": "none", "engine.overlap_depth": 0, "kv.prefix_cache": False}
    async with served(subject, plugins_with(subject.method, None), **off) as (api, client):
        for each in made:
            if "stop" not in each.body:
                continue
            plain = {key: value for key, value in each.body.items() if key not in ("stop", "min_tokens", "n")}
            [choice] = (await api.post(each.path, **{**plain, "max_tokens": LENGTH + 6}))["choices"]
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            each.body["stop"] = [text[place : place + 3] for place in each.body["stop"]]
        for each, (whole, streamed) in zip(made, await ask(api, made), strict=True):
            each.whole, each.streamed = whole, streamed
        return made, client.texts


async def ask(api: Api, made: list[Answer]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each whole and streamed, all at once: in deterministic mode they do not touch each other."""

    async def one(asked: Answer) -> tuple[dict[str, Any], dict[str, Any]]:
        usage = {"stream_options": {"include_usage": True}}
        whole, events = await asyncio.gather(api.post(asked.path, **asked.body), api.events(asked.path, **asked.body, **usage))
        return comparable(whole), joined(events)

    return await asyncio.gather(*map(one, made))


async def differences(subject: Subject, made: list[Answer], doctor: Doctor, depth: int) -> dict[str, list[str]]:
    """Feature → what of its answers is not as it is with speculation off."""
    settings = {
        "speculative.method": "watched",
        "speculative.k": 4,
        "speculative.min_acceptance": 0.0,
        "engine.overlap_depth": depth,
    }
    wrong: dict[str, list[str]] = {feature: [] for feature in ANSWERS}
    async with served(subject, plugins_with(subject.method, doctor), **settings) as (api, _):
        found = await ask(api, made)
        stats = api.engine.stats().speculative
    assert stats.error is None
    assert sum(stats.drafted) > 0
    for each, (whole, streamed) in zip(made, found, strict=True):
        wrong[each.feature] += ["whole"] * (whole != each.whole) + ["streamed"] * (streamed != each.streamed)
    return wrong


def comparable(answer: dict[str, Any]) -> dict[str, Any]:
    """Of an answer what does not depend on the time, on chance, on drafts or on the prefix cache."""
    choices = answer["choices"]
    for choice in choices:
        for call in choice.get("message", {}).get("tool_calls", []):
            del call["id"]
    return {"choices": choices, "usage": {key: answer["usage"][key] for key in ("prompt_tokens", "completion_tokens")}}


def joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The events of a stream as one answer: how many tokens an event brings is speculation's to change."""
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        for chunk in event["choices"]:
            choice = choices.setdefault(chunk["index"], {"pieces": {}, "logprobs": {}, "calls": {}})
            for name, piece in {"text": chunk.get("text"), **chunk.get("delta", {})}.items():
                if isinstance(piece, str):
                    choice["pieces"][name] = choice["pieces"].get(name, "") + piece
            for call in chunk.get("delta", {}).get("tool_calls", []):
                said = choice["calls"].setdefault(call["index"], ["", ""])
                said[0] += call["function"].get("name", "")
                said[1] += call["function"]["arguments"]
            for name, values in (chunk["logprobs"] or {}).items():
                choice["logprobs"].setdefault(name, []).extend(values or [])
            choice["finish_reason"] = chunk["finish_reason"] or choice.get("finish_reason")
    usage = events[-1]["usage"]
    return {"choices": choices, "usage": {key: usage[key] for key in ("prompt_tokens", "completion_tokens")}}
