"""Commands that ask a running server."""

from __future__ import annotations

from typing import Any

from ..core.errors import FluentError


class ServerFailed(FluentError):
    """A server that is talked to cannot answer."""

    status, code = 502, "server_failed"


def root(url: str) -> str:
    """Without the `/v1` that OpenAI's clients want, which the banner's URL has."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def get_json(url: str, path: str, api_key: str | None) -> Any:
    """What the server at `url` answers to GET `path`. Raises `ServerFailed`."""
    import httpx

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        response = httpx.get(root(url) + path, headers=headers, timeout=30)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        message = f"{url} does not answer: {error or type(error).__name__}."
        raise ServerFailed(message, fix="Start `fluent serve`, or give another --url.") from None
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if response.status_code == 200 and answer is not None:
        return answer
    told = answer.get("error") if isinstance(answer, dict) else None
    why = told.get("message") if isinstance(told, dict) else f"status {response.status_code}"
    raise ServerFailed(f"{url}{path}: {why}", fix="Give the --url, and the --api-key, of a FluentLLM server.")
