"""Bad input: each kind has its status and message in OpenAI's format, and leaves nothing behind in a real engine."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fluentllm.core.errors import EngineDied, QueueFull
from fluentllm.frontend.http import MAX_HEAD

from .conftest import Api, connection_count_settles, error_of, idle, nothing_left, serving_real

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "Hi"}]
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.fixture(scope="module")
def big() -> bytes:
    return b'{"prompt": "' + b"x" * 50_000_000 + b'"}'


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    # path, body, param, words of the message
    (CHAT, {"messages": HI, "temprature": 1}, "temprature", "'temperature'"),
    (CHAT, {"messages": HI, "stream_options": {"include_usge": True}}, "stream_options.include_usge", "'include_usage'"),
    (CHAT, {"messages": HI, "tools": [{"type": "function"}]}, "tools[0].function", "missing"),
    (CHAT, {"messages": HI, "lora_request": {}}, "lora_request", "disaggregated_params, ebnf, frequency_penalty, grammar"),
    (CHAT, {"messages": HI, "guided_decoding": {}}, "guided_decoding", "'guided_choice'"),
    (CHAT, {"messages": HI, "chat_template_kwargs": {"think": False}}, "chat_template_kwargs.think", "It has: thinking."),
    (CHAT, {"messages": HI, "tool_choice": "auto"}, "tool_choice", "no tools are"),
    (
        CHAT,
        {"messages": HI, "response_format": {"type": "xml"}},
        "response_format.type",
        "json_object or json_schema or structural_tag or text",
    ),
    (CHAT, {"messages": HI, "response_format": {"type": "json_schema"}}, "response_format.json_schema", "without a json_"),
    (CHAT, {"messages": HI, "structured_outputs": {}}, "structured_outputs", "Give json, regex, choice"),
    (TEXT, {"prompt": "x", "regex": "a", "guided_choice": ["b"]}, "regex", "guided_choice and regex each say"),
    (TEXT, {"prompt": "x", "structured_outputs": {"json": {}, "json_object": True}}, "structured_outputs.json", "one of them"),
    (TEXT, {"prompt": "x", "guided_json": '{"type":'}, "guided_json", "not valid JSON"),
    (TEXT, {"prompt": "x", "guided_choice": []}, "guided_choice", "length >= 1"),
    (CHAT, {"messages": HI, "audio": {"voice": "x"}}, "audio", "text only"),
    (CHAT, {"messages": HI, "modalities": ["text", "audio"]}, "modalities", "text only"),
    (CHAT, {"messages": HI, "reasoning_effort": "high"}, "reasoning_effort", '"high"'),
    (CHAT, {"messages": HI, "temperature": 2.5}, "temperature", "2.5"),
    (CHAT, {"messages": HI, "temperature": "hot"}, "temperature", '"hot"'),
    (CHAT, {"messages": HI, "top_p": -0.1}, "top_p", "-0.1"),
    (CHAT, {"messages": HI, "max_tokens": True}, "max_tokens", "true"),
    (CHAT, {"messages": HI, "max_tokens": 0}, "max_tokens", "0"),
    (CHAT, {"messages": HI, "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differ"),
    (CHAT, {"messages": HI, "min_tokens": 9, "max_tokens": 8}, "min_tokens", "above max_tokens"),
    (CHAT, {"messages": HI, "n": 0}, "n", "0"),
    (CHAT, {"messages": HI, "n": 16384}, "n", "128"),
    (CHAT, {"messages": HI, "seed": 2**70}, "seed", "1180591620717411303424"),
    (CHAT, {"messages": HI, "stop": ["a", ""]}, "stop[1]", "length >= 1"),
    (CHAT, {"messages": HI, "stop": ["x"] * 17}, "stop", "length <= 16"),
    (CHAT, {"messages": HI, "stop_token_ids": [400]}, "stop_token_ids", "400"),
    (CHAT, {"messages": HI, "stop_token_ids": [-1]}, "stop_token_ids[0]", "-1"),
    (CHAT, {"messages": HI, "logit_bias": {"400": 1}}, "logit_bias", "400 entries"),
    (CHAT, {"messages": HI, "logit_bias": {"Paris": 1}}, "logit_bias", "'Paris'"),
    (CHAT, {"messages": HI, "logit_bias": {"1": 101}}, "logit_bias", '{"1": 101}'),
    (CHAT, {"messages": HI, "logit_bias": {"01": 1}}, "logit_bias", "'01'"),
    (CHAT, {"messages": HI, "metadata": {"a": 1}}, "metadata", "expected `str`"),
    (CHAT, {"messages": HI, "top_logprobs": 2}, "top_logprobs", "logprobs is not true"),
    (CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "21"),
    (CHAT, {"messages": HI, "logprobs": 3}, "logprobs", "bool"),
    (CHAT, {"messages": HI, "stream_options": {"include_usage": True}}, "stream_options", "stream is not true"),
    (CHAT, {"messages": HI, "skip_special_tokens": False}, "skip_special_tokens", "false is not supported"),
    (CHAT, {"messages": HI, "continue_final_message": True}, "continue_final_message", "true is not supported"),
    (CHAT, {"messages": HI, "bootstrap_room": [], "bootstrap_host": "a"}, "bootstrap_room", "length >= 1"),
    (CHAT, {"messages": HI, "prompt": "x"}, "prompt", "not known"),
    (CHAT, {}, "messages", "missing"),
    (CHAT, {"messages": []}, "messages", "length >= 1"),
    (CHAT, {"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role", "developer or system"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "no content"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "5"),
    (CHAT, {"messages": IMAGE}, "messages[0].content[0].type", "text only"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "name": "Al"}]}, "messages[0].name", "prints none"),
    (CHAT, {"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}]}, "messages[0].tool_calls", "template"),
    (CHAT, {"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages[0]", "tool_call_id"),
    (TEXT, {}, "prompt", "missing"),
    (TEXT, {"prompt": ""}, "prompt", "no tokens"),
    (TEXT, {"prompt": []}, "prompt", "empty"),
    (TEXT, {"prompt": [[]]}, "prompt", "no tokens"),
    (TEXT, {"prompt": ["a", 1]}, "prompt", "mixes"),
    (TEXT, {"prompt": [400]}, "prompt", "400"),
    (TEXT, {"prompt": [-1]}, "prompt", "-1"),
    (TEXT, {"prompt": {"a": 1}}, "prompt", "object"),
    (TEXT, {"prompt": "x", "suffix": "y"}, "suffix", "not supported"),
    (TEXT, {"prompt": "x", "best_of": 4}, "best_of", "best_of = 4"),
    (TEXT, {"prompt": "x", "logprobs": 21}, "logprobs", "21"),
    (TEXT, {"prompt": "x", "max_tokens": 0}, "max_tokens", "echo"),
    (TEXT, {"prompt": "x", "tools": []}, "tools", "not known"),
    (TEXT, {"prompt": ["x"] * 300, "n": 100}, "prompt", "30000"),
    ("/tokenize", {}, "prompt", "either"),
    ("/tokenize", {"prompt": "x", "messages": HI}, "prompt", "either"),
    ("/tokenize", {"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt", "messages"),
    ("/detokenize", {"tokens": [400]}, "tokens", "400"),
    ("/detokenize", {"tokens": "x"}, "tokens", '"x"'),
]


async def test_what_is_not_honoured_is_refused_by_name(echo: Api) -> None:
    for path, body, param, words in REFUSED:
        error = await echo.error(path, status=400, **body)
        assert error["type"] == "invalid_request_error", body
        assert error["param"] == param, error
        assert words in error["message"], error
    assert not echo.engine.requests


BROKEN = [
    (b"", "not valid JSON"),
    (b'{"prompt": "x"', "not valid JSON"),
    (b'{"prompt": "x"} y', "not valid JSON"),
    (b'{"prompt": NaN}', "not valid JSON"),
    (b'{"prompt": "\xff\xfe"}', "not valid UTF-8: invalid start byte at byte 12"),
    (b'{"prompt": "\xed\xa0\x80"}', "not valid UTF-8"),
    (b'{"prompt": "\\ud800"}', "not valid JSON"),
    (b'{"prompt": "x", "temperature": 1e999}', "temperature"),
    (b"[" * 200_000, "object"),
    (b'{"prompt":' + b"[" * 200_000, "prompt"),
    (b'{"n": 0, "prompt":' + b"[" * 200_000, "n = "),
    (b'"prompt"', "object"),
]


async def test_a_broken_body_is_a_400(echo: Api) -> None:
    for body, words in BROKEN:
        error = error_of(await echo.http.post(TEXT, content=body), 400)
        assert words in error["message"], (body[:40], error)
    packed = await echo.http.post(TEXT, content=gzip.compress(b'{"prompt": "x"}'), headers={"content-encoding": "gzip"})
    assert "'gzip'" in error_of(packed, 400)["message"]


async def test_a_body_over_the_limit_is_a_413(echo: Api, big: bytes) -> None:
    error = error_of(await echo.http.post(TEXT, content=big), 413)
    assert "50000014 bytes" in error["message"]
    assert error["code"] == "body_too_large"

    async def unannounced() -> AsyncIterator[bytes]:
        for start in range(0, len(big), 1 << 20):
            yield big[start : start + (1 << 20)]

    error = error_of(await echo.http.post(TEXT, content=unannounced()), 413)
    assert "server.max_body_bytes" in error["message"]
    assert (await echo.complete("still there"))["choices"]


async def test_a_long_prompt_is_refused_with_the_numbers(real: Api) -> None:
    error = await real.error(TEXT, status=400, prompt=list(range(300)) * 2)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    assert "600 tokens" in error["message"]
    assert "512 tokens" in error["message"]
    error = await real.error(TEXT, status=400, prompt=[5] * 500, max_tokens=13)
    assert "513 in all" in error["message"]
    assert error["param"] == "max_tokens"
    error = await real.error(CHAT, status=400, messages=[{"role": "user", "content": "again and " * 1_000_000}])
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    whole = await real.complete([5] * 500, max_tokens=12, ignore_eos=True)
    assert whole["usage"]["total_tokens"] == 512


async def test_unknown_models_paths_and_methods(echo: Api) -> None:
    error = await echo.error(CHAT, status=404, messages=HI, model="gpt-4")
    assert error["code"] == "model_not_found"
    assert "'gpt-4'" in error["message"]
    assert "'tiny'" in error["message"]
    error_of(await echo.http.get("/v1/models/gpt-4"), 404)
    error = error_of(await echo.http.get("/v1/nothing"), 404)
    assert "/v1/models/{model}," in error["message"]
    error_of(await echo.http.get("/v1/models/"), 404)
    response = await echo.http.get(CHAT)
    assert "POST" in error_of(response, 405)["message"]
    assert response.headers["allow"] == "POST"


async def test_a_full_queue_is_a_429_also_for_streams(chat_folder: Path) -> None:
    async with serving_real(chat_folder, **{"scheduler.max_waiting": 1, "scheduler.max_running": 1}) as api:
        asks = [api.http.post(TEXT, json={"prompt": "Hi", "max_tokens": 100, "stream": i % 2 == 0}) for i in range(8)]
        answers = await asyncio.gather(*asks)
        refused = [answer for answer in answers if answer.status_code != 200]
        assert refused
        assert len(refused) < 8
        for answer in refused:
            assert error_of(answer, 429)["code"] == QueueFull.code
            assert answer.headers["retry-after"] == "1"


async def test_an_engine_that_dies_is_a_503_or_the_last_event(echo: Api) -> None:
    echo.engine.failure = EngineDied("The engine went away.")
    for stream in (False, True):
        response = await echo.http.post(CHAT, json={"messages": HI, "stream": stream})
        assert error_of(response, 503)["code"] == "engine_died"
    echo.engine.fail_after = 3
    async with echo.http.stream("POST", CHAT, json={"messages": HI, "stream": True}) as response:
        assert response.status_code == 200
        events = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["code"] == "engine_died"
    assert len(events) == 5
    assert not echo.engine.running


async def test_one_choice_that_fails_ends_the_others(echo: Api) -> None:
    echo.engine.failure, echo.engine.fail_after = EngineDied("The engine went away."), 2
    error_of(await echo.http.post(CHAT, json={"messages": HI, "n": 5}), 503)
    assert not echo.engine.running


@pytest.mark.parametrize("state", ["starting", "restarting", "failed"])
async def test_health_tells_the_truth(echo: Api, state: str) -> None:
    assert (await echo.http.get("/health")).json() == {"status": "ready"}
    echo.engine.state = state
    response = await echo.http.get("/health")
    assert (response.status_code, response.json()) == (503, {"status": state})
    assert (await echo.http.get("/live")).status_code == 200
    error_of(await echo.http.post(CHAT, json={"messages": HI}), 503)
    if state == "starting":
        echo.engine.info = None
        error_of(await echo.http.post(CHAT, json={"messages": HI}), 503)
        assert (await echo.http.get("/v1/models")).json()["data"][0]["max_model_len"] is None


async def test_a_bug_is_a_500_without_details(echo: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(echo.services.generation, "job", broken)
    error = error_of(await echo.http.post(CHAT, json={"messages": HI}), 500)
    assert "secret" not in error["message"]
    response = await echo.http.post(CHAT, json={"messages": HI, "stream": True})
    assert error_of(response, 500)["type"] == "server_error"


async def test_the_key_is_asked_for(chat_folder: Path) -> None:
    async with serving_real(chat_folder, **{"server.api_key": "sesame"}) as api:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic sesame"}):
            response = await api.http.get("/v1/models", headers=headers)
            assert error_of(response, 401)["code"] == "invalid_api_key"
            error_of(await api.http.post(CHAT, json={"messages": HI}, headers=headers), 401)
        assert (await api.http.get("/v1/models", headers={"authorization": "Bearer sesame"})).status_code == 200
        assert (await api.http.get("/health")).status_code == 200
        assert (await api.http.get("/live")).status_code == 200


async def test_refusals_leave_nothing_behind(real: Api, big: bytes) -> None:
    """No request ever enters, no page, task or file descriptor stays behind, and the next request is served."""
    kinds = {
        "malformed": [(TEXT, content, 400) for content, _ in BROKEN],
        "not honoured": [(path, json.dumps(body).encode(), 400) for path, body, _, _ in REFUSED],
        "invalid UTF-8": [(TEXT, b'{"prompt": "\xff\xfe"}', 400), (CHAT, b'{"messages": [{"role": "user\x80"}]}', 400)],
        "n = 16384": [(TEXT, b'{"prompt": "x", "n": 16384}', 400)],
        "a prompt that is too long": [(TEXT, json.dumps({"prompt": "word " * 5000}).encode(), 400)],
        "an unknown model": [(TEXT, b'{"prompt": "x", "model": "gpt-9"}', 404)],
        "50 MB": [(TEXT, big, 413)],
    }
    await real.http.post(TEXT, content=b"{")  # what the first request of all makes is there to stay
    await real.http.aclose()
    await connection_count_settles(real)
    for name, requests in kinds.items():
        with nothing_left(real):
            async with httpx.AsyncClient(base_url=real.url, timeout=30) as http:
                for path, content, status in requests:
                    assert (await http.post(path, content=content)).status_code == status, (name, content[:60])
            await connection_count_settles(real)
            await idle(real.engine)
    assert real.engine.stats().prompt_tokens == 0
    async with httpx.AsyncClient(base_url=real.url, timeout=30) as http:
        answer = await http.post(TEXT, json={"prompt": "Once", "max_tokens": 2, "ignore_eos": True})
    assert answer.json()["usage"]["completion_tokens"] == 2


GOOD = b'{"prompt": "x", "max_tokens": 1}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01 not http at all\r\n\r\n",
        CHUNKED + b"zz\r\n" + GOOD + b"\r\n0\r\n\r\n",
        CHUNKED + b"5\r\n" + GOOD + b"\r\n0\r\n\r\n",
        HEAD + b"content-length: -5\r\n\r\n" + GOOD,
        HEAD + b"content-length: 5\r\ncontent-length: 7\r\n\r\n" + GOOD,
        HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
    ids=["no HTTP", "chunk without a size", "chunk longer than said", "negative length", "two lengths", "length and chunks"],
)
async def test_broken_http_is_a_400(echo: Api, sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    url = httpx.URL(echo.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(sent)
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n")
    assert json.loads(body)["error"]["code"] == "invalid_http"
    writer.close()
    await writer.wait_closed()
    await asyncio.sleep(0.02)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize(
    "start", [HEAD + b"x: ", CHUNKED + b"%x\r\n" % len(GOOD) + GOOD + b"\r\n0\r\nx: "], ids=["head", "trailer"]
)
async def test_headers_without_end_are_not_kept(echo: Api, start: bytes, caplog: pytest.LogCaptureFixture) -> None:
    url = httpx.URL(echo.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(start)
    await asyncio.sleep(0.1)  # so that what follows counts in full
    writer.write(b"a" * (MAX_HEAD + 1))
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert "longer than 1048576 bytes" in json.loads(body)["error"]["message"]
    writer.close()
    await asyncio.sleep(0.02)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    await echo.complete()
