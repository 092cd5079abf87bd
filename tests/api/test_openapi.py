"""`/openapi.json`: complete, and true of what the server takes and sends."""

from __future__ import annotations

import re
from typing import Any

import jsonschema
import msgspec
import pytest

from fluentllm.core.plugins.routes import Route
from fluentllm.plugins.api_openai import plugin
from fluentllm.plugins.api_openai.openapi import build
from fluentllm.plugins.api_openai.schema import ChatRequest

from .conftest import Api


@pytest.fixture
async def document(echo: Api) -> dict[str, Any]:
    response = await echo.http.get("/openapi.json")
    assert response.status_code == 200
    found: dict[str, Any] = response.json()
    return found


def registered() -> list[Route]:
    routes: list[Route] = []

    def register(path: str, endpoint: Any, *, methods: Any = ("GET",), summary: str = "") -> None:
        routes.append(Route(path, endpoint, tuple(methods), summary, "api_openai", "here"))

    plugin.fluent_routes(register)
    return routes


def test_every_route_is_described() -> None:
    document = build(registered())
    assert document["openapi"] == "3.1.0"
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert len(operations) == len(registered())
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    for operation in operations:
        assert operation["summary"]
        assert "default" in operation["responses"]
    assert document["paths"]["/v1/models/{model}"]["get"]["parameters"][0]["name"] == "model"


def test_every_reference_leads_somewhere() -> None:
    document = build(registered())
    schemas = document["components"]["schemas"]
    for name in re.findall(r'"#/components/schemas/([^"]+)"', msgspec.json.encode(document).decode()):
        assert name in schemas


def test_other_plugins_routes_are_listed() -> None:
    async def hello(request: Any) -> Any:
        """A route that names no Structs."""

    document = build([*registered(), Route("/hello/{who}", hello, ("GET", "POST"), "Greet.", "other", "there")])
    assert set(document["paths"]["/hello/{who}"]) == {"get", "post"}
    assert document["paths"]["/hello/{who}"]["get"]["tags"] == ["other"]


async def test_the_document_is_valid(document: dict[str, Any]) -> None:
    """OpenAPI 3.1's schemas are JSON Schema."""
    for name, schema in document["components"]["schemas"].items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema.get("type") == "object", name


async def test_answers_fit_the_document(echo: Api, document: dict[str, Any]) -> None:
    def check(value: Any, kind: str) -> None:
        root = {"$ref": f"#/components/schemas/{kind}", "components": document["components"]}
        jsonschema.Draft202012Validator(root).validate(value)

    check(await echo.chat(logprobs=True, top_logprobs=2), "ChatCompletion")
    check(await echo.complete(logprobs=2, echo=True), "TextCompletion")
    for event in await echo.events("/v1/chat/completions", messages=[{"role": "user", "content": "x"}], logprobs=True):
        check(event, "ChatChunk")
    check((await echo.http.get("/nowhere")).json(), "ErrorBody")
    request = {"messages": [{"role": "user", "content": "x"}], "temperature": 0.5, "stop": ["x"], "user": "me"}
    check(request, "ChatRequest")
    with pytest.raises(jsonschema.ValidationError):
        check({**request, "temperature": 3}, "ChatRequest")
    with pytest.raises(jsonschema.ValidationError):
        check({**request, "unknown": 3}, "ChatRequest")


def test_the_schema_names_every_field() -> None:
    document = build(registered())
    assert set(document["components"]["schemas"]["ChatRequest"]["properties"]) == set(ChatRequest.__struct_fields__)
