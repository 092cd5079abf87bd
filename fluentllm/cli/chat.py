"""`fluent chat`: talk to a model in the terminal, in this process or on a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import FluentError
from . import options

if TYPE_CHECKING:
    from ..frontend.generation import Generation

Answer = Callable[[list[dict[str, str]]], str]
"""Prints the answer as it comes, and returns it."""


def chat(
    model: options.Model = None,
    url: Annotated[str | None, typer.Option(help="Talk to this server instead, such as http://127.0.0.1:8000.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.7,
    max_tokens: Annotated[int | None, typer.Option(help="Most new tokens of an answer.")] = None,
    api_key: options.ApiKey = None,
    device: options.Device = None,
    config: options.Config = None,
    sets: options.Sets = None,
) -> None:
    """Chat in the terminal. An empty line or Ctrl-D ends it; `/new` begins a new conversation."""
    sampling = {"temperature": temperature, "max_tokens": max_tokens}
    if url is not None:
        _talk(lambda messages: asyncio.run(_print(_from_server(url, api_key, messages, sampling))), system)
        return

    from ..frontend.sampling import SamplingOptions
    from ..local import LocalEngine

    settings = options.load(config, {"model.name": model, "engine.device": device}, sets).settings
    choices = SamplingOptions(temperature=temperature, max_tokens=max_tokens)
    with LocalEngine(settings, lambda line: typer.echo(line, err=True)) as local:
        _talk(lambda messages: local.call(_print(_from_engine(local.generation, messages, choices))), system)


def _talk(answer: Answer, system: str | None) -> None:
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            typer.echo()
            return
        if not line:
            return
        if line == "/new":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": line})
        try:
            messages.append({"role": "assistant", "content": answer(messages)})
        except FluentError as error:
            typer.echo(f"error: {error}", err=True)
            messages.pop()


async def _print(pieces: AsyncIterator[str]) -> str:
    text = ""
    async for piece in pieces:
        typer.echo(piece, nl=False)
        text += piece
    typer.echo()
    return text


async def _from_engine(generation: Generation, messages: list[dict[str, str]], choices: Any) -> AsyncIterator[str]:
    job = generation.job([await generation.encode_chat(messages)], choices)
    async with aclosing(generation.stream(job)) as deltas:
        async for delta in deltas:
            yield delta.text


async def _from_server(url: str, api_key: str | None, messages: Any, sampling: dict[str, Any]) -> AsyncIterator[str]:
    import httpx

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    given = {key: value for key, value in sampling.items() if value is not None}
    try:
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=None) as client:
            model = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
            body = {"model": model, "messages": messages, "stream": True, **given}
            async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    raise FluentError((await answer.aread()).decode(errors="replace"))
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line[6:])
                        if "error" in event:
                            raise FluentError(event["error"]["message"])
                        for choice in event.get("choices", ()):
                            yield choice["delta"].get("content") or ""
    except httpx.HTTPError as error:
        raise FluentError(f"{url} does not answer: {error}.", fix="Start `fluent serve`, or give another --url.") from None


def register(app: typer.Typer) -> None:
    app.command()(chat)
