"""`fluent chat`: talk to a model in the terminal, in this process or on a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import FluentError
from . import options
from .output import mark
from .server import ServerFailed, root

if TYPE_CHECKING:
    import httpx

    from ..frontend.generation import Generation

Answer = Callable[[list[dict[str, str]]], str]
"""Prints the answer as it comes, and returns it."""
EXIT_UNANSWERED = 2


def chat(
    model: options.Model = None,
    url: Annotated[str | None, typer.Option(help="Talk to this server instead, such as http://127.0.0.1:8000.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.7,
    max_tokens: Annotated[int | None, typer.Option(help="Most new tokens of an answer.")] = None,
    api_key: options.ServerKey = None,
    device: options.Device = None,
    config: options.Config = None,
    sets: options.Sets = None,
) -> None:
    """Chat in the terminal, with a model in this process or, with --url, on a server.

    An empty line or Ctrl-D ends it, Ctrl-C ends an answer; `/new` begins a new conversation. Exits with 2 if the last question
    got an error instead of an answer.
    """
    flags = {"model.name": model, "engine.device": device, "server.api_key": api_key}
    settings = options.load(config, flags, sets).settings
    if url is not None:
        server = _Server(root(url), settings.server.api_key, model, {"temperature": temperature, "max_tokens": max_tokens})
        _talk(lambda messages: asyncio.run(_print(server.answer(messages))), system)
        return

    from ..frontend.sampling import SamplingOptions, check_options
    from ..local import LocalEngine

    choices = check_options(SamplingOptions(temperature=temperature, max_tokens=max_tokens))
    with LocalEngine(settings, lambda line: typer.echo(line, err=True)) as local:
        _talk(lambda messages: local.call(_print(_from_engine(local.generation, messages, choices))), system)


def _talk(answer: Answer, system: str | None) -> None:
    """Raises `typer.Exit` where the last question got no answer."""
    start = [{"role": "system", "content": system}] if system else []
    messages, failed = list(start), False
    while line := _asked():
        if line == "/new":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": line})
        failed = False
        try:
            messages.append({"role": "assistant", "content": answer(messages)})
        except FluentError as error:
            typer.echo(f"error: {error}", err=True)
            messages.pop()
            failed = True
        except KeyboardInterrupt:
            typer.echo("\n(the answer was ended, and is forgotten)", err=True)
            messages.pop()
    if failed:
        raise typer.Exit(EXIT_UNANSWERED)


def _asked() -> str:
    """What was typed; empty at the end."""
    try:
        return input("> ").strip()
    except EOFError:
        typer.echo()
        return ""


async def _print(pieces: AsyncIterator[str]) -> str:
    text = ""
    async for piece in pieces:
        typer.echo(piece, nl=False)
        text += piece
    typer.echo()
    return text


async def _from_engine(generation: Generation, messages: list[dict[str, str]], choices: Any) -> AsyncIterator[str]:
    mark(generation.info.synthetic)
    job = generation.job([await generation.encode_chat(messages)], choices)
    async with aclosing(generation.stream(job)) as deltas:
        async for delta in deltas:
            yield delta.text


@dataclass(frozen=True, slots=True)
class _Server:
    """A server with OpenAI's API."""

    url: str
    api_key: str | None
    model: str | None
    """None: the first that it serves."""
    sampling: Mapping[str, Any]

    async def answer(self, messages: list[dict[str, str]]) -> AsyncIterator[str]:
        import httpx

        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        given = {key: value for key, value in self.sampling.items() if value is not None}
        try:
            async with httpx.AsyncClient(base_url=self.url, headers=headers, timeout=None) as client:
                model = self.model or _checked(await client.get("/v1/models"))["data"][0]["id"]
                body = {"model": model, "messages": messages, "stream": True, **given}
                async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                    if response.status_code != 200:
                        await response.aread()
                        _checked(response)
                    told = False
                    async for line in response.aiter_lines():
                        if line.startswith("data: {"):
                            event = json.loads(line[6:])
                            if not told:
                                mark(event.get("synthetic"))
                                told = True
                            yield _text(event)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            message = f"{self.url} does not answer: {error or type(error).__name__}."
            raise ServerFailed(message, fix="Start `fluent serve`, or give another --url.") from None
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ServerFailed(
                f"{self.url} answers, but not as OpenAI's API does.", fix="Give the --url of a server that has it."
            ) from None


def _checked(response: httpx.Response) -> Any:
    """Its JSON. Raises `ServerFailed` with the message of an error."""
    content = response.json()
    if response.status_code != 200:
        raise ServerFailed(f"{content['error']['message']} (status {response.status_code})")
    return content


def _text(event: dict[str, Any]) -> str:
    if "error" in event:
        raise ServerFailed(str(event["error"]["message"]))
    return "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))


def register(app: typer.Typer) -> None:
    app.command()(chat)
