"""Dynamo's requests and answers, which are dictionaries, as the engine's. Without Dynamo, and without torch.

Dynamo's front end has the tokenizer: it sends token ids, gets token ids, and ends answers at stop strings itself.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from msgspec import to_builtins

from ..core.errors import InvalidRequest
from ..core.types import GrammarSpec, Handoff, HandoffReport, Request, RequestOutput, SamplingParams
from ..frontend import structured
from ..frontend.choices import Delta, verification
from ..plugins.api_openai.chunks import usage_body

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..frontend.generation import Usage

GRAMMARS: dict[str, Callable[[Any], GrammarSpec]] = {
    "json": structured.json_schema,
    "regex": structured.regex,
    "choice": structured.choice,
    "grammar": structured.grammar,
    "structural_tag": structured.structural_tag,
}
"""Field of Dynamo's `GuidedDecodingOptions` → what makes a grammar of its value."""
FINISH = {"stop": "stop", "length": "length", "abort": "cancelled"}


def request_of(body: dict[str, Any], name: str, *, max_model_len: int, role: str) -> Request:
    """role: prefill, decode or both. Raises `InvalidRequest`."""
    prompt, handoff = list(body["token_ids"]), _handoff(body, name, role)
    return Request(id=name, prompt=prompt, params=_params(body, max_model_len - len(prompt)), handoff=handoff)


def _params(body: dict[str, Any], room: int) -> SamplingParams:
    sampling, stop = _given(body, "sampling_options"), _given(body, "stop_conditions")
    if sampling.get("n", 1) > 1:
        raise InvalidRequest("n is above 1, which is not served through Dynamo.", param="n")
    names = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    floats: dict[str, Any] = {field: float(sampling[field]) for field in names if field in sampling}
    seed = sampling.get("seed")
    return SamplingParams(
        max_tokens=stop.get("max_tokens", max(1, room)),
        min_tokens=stop.get("min_tokens", 0),
        top_k=max(0, sampling.get("top_k", 0)),  # -1 means off there, 0 here
        seed=secrets.randbits(62) if seed is None else seed,
        stop_token_ids=tuple({*stop.get("stop_token_ids", ()), *stop.get("stop_token_ids_hidden", ())}),
        ignore_eos=bool(stop.get("ignore_eos", False)),
        logprobs=_given(body, "output_options").get("logprobs"),
        grammar=_grammar(sampling),
        **floats,
    )


def _grammar(sampling: dict[str, Any]) -> GrammarSpec | None:
    """What the text must be; which library sees to it (`backend`) is ours to choose. Dynamo lets one of them through."""
    given = _given(sampling, "guided_decoding")
    for name, make in GRAMMARS.items():
        if given.get(name):
            return make(given[name])
    for name in sorted(given.keys() - GRAMMARS.keys() - {"backend"}):
        raise InvalidRequest(f"guided_decoding.{name} is not served here.", fix=f"Give {' or '.join(GRAMMARS)}.", param=name)
    return None


def _given(body: dict[str, Any], group: str) -> dict[str, Any]:
    """Options that are set: those that are not come as None."""
    return {key: value for key, value in (body.get(group) or {}).items() if value is not None}


def _handoff(body: dict[str, Any], name: str, role: str) -> Handoff | None:
    """bootstrap: both engines get `bootstrap_info`, at once. pull: decode gets what prefill answered with. A decode request
    with neither has its prompt computed where it decodes."""
    if role == "both":
        return None
    met = body.get("bootstrap_info")
    if met:
        here = role == "prefill"
        where = ("", 0) if here else (met["bootstrap_host"], met["bootstrap_port"])
        return Handoff(id=f"room-{met['bootstrap_room']}", host=where[0], port=where[1], concurrent=True)
    if role == "prefill":
        return Handoff(id=name)
    told = ((body.get("prefill_result") or {}).get("disaggregated_params") or {}).get("kv_transfer_params")
    if not told:
        return None
    return Handoff(id=told["handoff"], host=told["remote_host"], port=told["remote_port"])


def transfer_params(report: HandoffReport, body: dict[str, Any]) -> dict[str, Any]:
    """What prefill answers with, `disaggregated_params`."""
    if body.get("bootstrap_info"):
        return dict(body["bootstrap_info"])
    told = {"do_remote_prefill": True, "remote_host": report.host, "remote_port": report.port, "handoff": report.id}
    return {"kv_transfer_params": told}


def chunk_of(output: RequestOutput, synthetic: str | None) -> dict[str, Any]:
    """Without usage and the end's own fields. `synthetic`: of the engine (`ModelInfo.synthetic`)."""
    chunk: dict[str, Any] = {"token_ids": output.tokens, "index": 0}
    if synthetic is not None:
        # The one field of words that Dynamo hands on, to clients that ask for it: as `nvext.engine_data`.
        chunk["engine_data"] = {"synthetic": synthetic}
    if output.logprobs is not None:
        chunk["log_probs"] = [logprob.logprob for logprob in output.logprobs]
        chunk["top_logprobs"] = [
            [
                {"rank": rank, "token_id": token, "token": None, "logprob": value}
                for rank, (token, value) in enumerate(logprob.top, start=1)
            ]
            for logprob in output.logprobs
        ]
    return chunk


def count(usage: Usage, output: RequestOutput) -> None:
    """Add what one step brought."""
    tokens = len(output.tokens)
    drafts = {verification(output, tokens): 1} if output.drafted else None
    cached, handoff = output.cached_tokens, output.handoff
    usage.add(Delta(0, "", output.tokens, new_tokens=tokens, cached_tokens=cached, drafts=drafts, handoff=handoff), n=1)


def ended(output: RequestOutput, usage: Usage) -> dict[str, Any]:
    """What the last chunk says besides; the usage as in answers of `fluent serve`, of which Dynamo hands on OpenAI's fields."""
    reason = FINISH.get(output.finish_reason or "", "error")
    return {"finish_reason": reason, "completion_usage": to_builtins(usage_body(usage))}
