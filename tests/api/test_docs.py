"""`docs/api.md` says what the code does: every field, route and error code, no more and no less."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from fluentllm.core import errors
from fluentllm.frontend.sampling import SamplingOptions
from fluentllm.plugins.api_openai.schema import IGNORED, REFUSED, ChatRequest, CompletionRequest, GenerationRequest

from .test_openapi import registered

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")


def table(heading: str) -> dict[str, str]:
    """First cell → last cell of the table under a heading."""
    section = re.split(r"^## ", PAGE, flags=re.M)
    [text] = [part for part in section if part.startswith(heading + "\n")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("| `")]
    rows += [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if re.match(r"\| \d", line)]
    assert rows
    return {row[0].strip("`| "): row[-1] for row in rows}


def test_ignored_fields() -> None:
    assert table("Accepted, without a meaning here") == IGNORED
    for name in IGNORED:
        assert name in GenerationRequest.__struct_fields__


def test_refused_fields() -> None:
    listed = table("Refused, unless the value asks for nothing")
    assert set(listed) == set(REFUSED) - {"best_of"}
    for name, values in listed.items():
        kind = CompletionRequest if name == "suffix" else ChatRequest
        rest = {"prompt": "x"} if name == "suffix" else {"messages": [{"role": "user", "content": "x"}]}
        for value in re.findall(r"`([^`]+)`|(null)", values):
            msgspec.convert({**rest, name: msgspec.json.decode(value[0] or value[1])}, kind)
        for value in ("x", True, [1], {"type": "x"}):
            with pytest.raises(msgspec.ValidationError):
                msgspec.convert({**rest, name: value}, kind)


def test_honoured_fields() -> None:
    common, chat, text = (
        set(table(f"Fields of {what}")) for what in ("both kinds of completion", "chat completions", "text completions")
    )
    assert common == set(GenerationRequest.__struct_fields__) - set(IGNORED)
    assert common > set(SamplingOptions.__struct_fields__)
    assert chat == set(ChatRequest.__struct_fields__) - set(GenerationRequest.__struct_fields__) - set(REFUSED)
    assert text == set(CompletionRequest.__struct_fields__) - set(GenerationRequest.__struct_fields__) - {"suffix"}


def test_routes() -> None:
    listed = {name.replace("{model}", "{model:path}") for name in table("Routes")}
    assert listed == {f"{method} {route.path}" for route in registered() for method in route.methods}


def test_error_codes() -> None:
    rows = re.findall(r"^\| (\d{3}) \| `(\w+)` \|", PAGE, flags=re.M)
    kinds = (
        errors.InvalidRequest, errors.ContextTooLong, errors.ModelNotFound, errors.BodyTooLarge, errors.BodyTooSlow,
        errors.QueueFull, errors.FluentError, errors.EngineUnavailable, errors.EngineDied,
    )  # fmt: skip
    gate = {(401, "invalid_api_key"), (404, "unknown_path"), (405, "method_not_allowed"), (400, "invalid_http")}
    assert {(int(status), code) for status, code in rows} == gate | {(kind.status, kind.code) for kind in kinds}


def test_bounds_in_the_text_are_those_of_the_schema() -> None:
    components = msgspec.json.schema_components([ChatRequest, CompletionRequest])[1]

    def bound(field: str, word: str, kind: str = "ChatRequest") -> float:
        options = components[kind]["properties"][field]["anyOf"]
        [found] = [option[word] for option in options if word in option]
        return float(found)

    rows = {**table("Fields of both kinds of completion"), **table("Fields of chat completions")}
    for field in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "top_logprobs"):
        low, high = re.search(r"(-?\d+) to (\d+)", rows[field]).groups()  # type: ignore[union-attr]
        assert (bound(field, "minimum"), bound(field, "maximum")) == (float(low), float(high)), field
    assert f"up to {int(bound('stop', 'maxItems'))}" in rows["stop"]
    assert f"Up to {int(bound('stop_token_ids', 'maxItems'))}" in rows["stop_token_ids"]
    assert f"at most {int(bound('logit_bias', 'maxProperties'))}" in rows["logit_bias"]
