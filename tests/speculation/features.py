"""Every feature of a request, in one batch of requests that differ: what speculation must not change."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine.harness import Running

from fluentllm.core.plugins import PluginManager

from .test_grammars import PAIRS, WORDS, ToyPlugin
from .test_host_grammars import BRACKETS, Plugin as BracketsPlugin
from .watching import WatchedPlugin

if TYPE_CHECKING:
    from fluentllm.core.types import RequestOutput

    from .lossless import Subject
    from .watching import Doctor

SAMPLED = {"temperature": 0.9}
FEATURES: dict[str, list[dict[str, Any]]] = {
    "greedy": [{}],
    "temperature, seed": [SAMPLED, {"temperature": 0.4}],
    "top_k": [{**SAMPLED, "top_k": 5}],
    "top_p": [{**SAMPLED, "top_p": 0.7}],
    "min_p": [{**SAMPLED, "min_p": 0.1}],
    "repetition_penalty": [{"repetition_penalty": 1.3}, {**SAMPLED, "repetition_penalty": 1.3}],
    "presence_penalty, frequency_penalty": [{"presence_penalty": 0.8, "frequency_penalty": 0.4}],
    "logit_bias": [{"logit_bias": {9: 3.0, 12: 2.0}}],
    "logit_bias of -100": [{"logit_bias": dict.fromkeys(range(3, 90), -100.0)}],
    "logprobs": [{"logprobs": 3}, {**SAMPLED, "logprobs": 0}],
    "prompt_logprobs": [{"prompt_logprobs": 2}],
    "min_tokens": [{"min_tokens": 7, "stop": 3}],
    "stop id inside a draft": [{"stop": 3}, {**SAMPLED, "stop": 6}],
    "end of sequence": [{**SAMPLED, "ignore_eos": False, "logit_bias": {2: 6.0}}],
    "max_tokens inside a draft": [{"max_tokens": 5}, {**SAMPLED, "max_tokens": 2}],
    "grammar": [{"grammar": WORDS}, {**SAMPLED, "grammar": PAIRS}],
    "grammar with a matcher on the host": [{"grammar": BRACKETS}, {**SAMPLED, "grammar": BRACKETS}],
    "all of sampling at once": [
        {
            "temperature": 0.8,
            "top_k": 30,
            "top_p": 0.95,
            "min_p": 0.01,
            "repetition_penalty": 1.2,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.3,
            "logit_bias": {9: 2.0, 11: -100.0},
            "logprobs": 2,
            "min_tokens": 4,
        }
    ],
    "priority": [{"priority": -1}, {"priority": 3}],
}
"""Feature → requests that use it. `stop`: the token at this place of the answer without it becomes a stop id."""
LENGTH = 10


@dataclass
class Asked:
    feature: str
    prompt: list[int]
    params: dict[str, Any]
    text: list[int] = field(default_factory=list)
    """Prompt and answer as they would be without stops and with a larger budget: where right drafts come from."""
    found: list[RequestOutput] = field(default_factory=list)
    """Speculation off."""


def plugins_with(method: str, doctor: Doctor | None) -> PluginManager:
    objects: dict[str, Any] = {"toys": ToyPlugin(), "brackets": BracketsPlugin()}
    if doctor is not None:
        own = PluginManager.load({"engine", "executor"}, allow=[], deny=[]).registry("proposers").get(method).factory
        objects["watched"] = WatchedPlugin(own, [], doctor)
    return PluginManager.load({"engine", "executor"}, allow=[], deny=[], objects=objects)


async def asked(subject: Subject) -> list[Asked]:
    """All requests, with what they get when nothing is drafted."""
    made = []
    for feature, requests in FEATURES.items():
        for chosen in requests:
            number = len(made)
            # Each with a prompt of its own, by which right drafts are found; with a repetition, for prompt lookup.
            prompt = [5, 6, 7, 8, 9, 10, 11, 12, 5, 6, 7, 20 + number, 5, 6]
            params = {"max_tokens": LENGTH, "seed": number, "temperature": 0.0, "ignore_eos": "grammar" not in chosen, **chosen}
            made.append(Asked(feature, prompt, params))
    settings = {"speculative.method": "none", "engine.overlap_depth": 0, "kv.prefix_cache": False}
    async with subject.model.engine(plugins=plugins_with(subject.method, None), **settings) as running:
        places = [each.params.pop("stop", None) for each in made]
        plain = [{**each.params, "max_tokens": LENGTH + 4, "min_tokens": 0} for each in made]
        for each, found in zip(made, await answers(running, made, plain), strict=True):
            each.text = each.prompt + [token for output in found for token in output.tokens]
        for each, place in zip(made, places, strict=True):
            if place is not None:
                each.params["stop_token_ids"] = (each.text[len(each.prompt) + place],)
        for each, found in zip(made, await answers(running, made, [each.params for each in made]), strict=True):
            each.found = found
    return made


async def answers(running: Running, made: list[Asked], params: list[dict[str, Any]]) -> list[list[RequestOutput]]:
    """All at once: in deterministic mode they do not touch each other."""
    ids = [running.submit(each.prompt, **chosen) for each, chosen in zip(made, params, strict=True)]
    return [await running.outputs(i) for i in ids]


def differences(asked: Asked, found: list[RequestOutput]) -> list[str]:
    """What of an answer is not as it is with speculation off."""

    def parts(outputs: list[RequestOutput]) -> dict[str, Any]:
        return {
            "tokens": [token for output in outputs for token in output.tokens],
            "logprobs": [lp for output in outputs for lp in output.logprobs or []],
            "prompt_logprobs": [lp for output in outputs for lp in output.prompt_logprobs or []],
            "finish_reason": outputs[-1].finish_reason,
            "stop_token": outputs[-1].stop_token,
        }

    wanted, got = parts(asked.found), parts(found)
    return [name for name in wanted if wanted[name] != got[name]]
