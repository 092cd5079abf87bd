"""What a job file and the lines of its input and output look like.

input: prompts.jsonl          # {"prompt": "…"} or {"messages": […]} a line; "id" and any sampling field may stand beside
output: results.jsonl
sampling: {max_tokens: 64, temperature: 0}
settings: {model: {name: smollm2}}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml
from msgspec import Meta, Struct, field

from ..core.errors import ConfigError, InvalidRequest
from ..frontend.sampling import SamplingOptions


class Job(Struct, kw_only=True, forbid_unknown_fields=True):
    """The job file. Paths are relative to its folder."""

    input: str
    output: str
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """For every line; a line's own fields win."""
    concurrency: Annotated[int, Meta(ge=1)] = 256
    """Lines that are with the engine, or wait for an earlier one to be written."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The settings tree, as in a file of `fluent serve --config`."""


class Line(Struct, kw_only=True, omit_defaults=True):
    """One line of the input. Exactly one of `prompt` and `messages`."""

    id: str | int | None = None
    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None


class Choice(Struct, kw_only=True):
    text: str
    finish_reason: str


class Result(Struct, kw_only=True, omit_defaults=True):
    """One line of the output. `index` counts the input's lines from 0; either `choices` or `error`."""

    index: int
    id: str | int | None = None
    choices: list[Choice] | None = None
    usage: dict[str, int] | None = None
    error: str | None = None


def load_job(path: Path) -> Job:
    """Raises `ConfigError` naming the file and the key."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.", fix="Name a job file; see the docs on jobs.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {error}.", fix="Correct it.") from None
    try:
        job = msgspec.convert(content, Job)
    except msgspec.ValidationError as error:
        known = ", ".join(Job.__struct_fields__)
        raise ConfigError(f"{path}: {error}.", fix=f"A job has the keys {known}.") from None
    job.input, job.output = (str((path.parent / name).expanduser()) for name in (job.input, job.output))
    return job


def dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{model: {name: x}}` → `model.name`, x."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def parse_line(text: bytes, defaults: SamplingOptions) -> tuple[Line, SamplingOptions]:
    """Raises `InvalidRequest` for a line that is not one."""
    try:
        content = msgspec.json.decode(text, type=dict[str, Any])
        own = {key: content.pop(key) for key in list(content) if key in SamplingOptions.__struct_fields__}
        unknown = sorted(content.keys() - set(Line.__struct_fields__))
        if unknown:
            raise InvalidRequest(f"Unknown field {unknown[0]!r}.", fix=f"Use {', '.join(Line.__struct_fields__)} or sampling.")
        line = msgspec.convert(content, Line)
        options = msgspec.convert({**msgspec.to_builtins(defaults), **own}, SamplingOptions)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise InvalidRequest(f"Not a line of a job: {error}.", fix="Write one JSON object a line.") from None
    if (line.prompt is None) == (line.messages is None):
        raise InvalidRequest("A line needs either prompt or messages.", fix="Give exactly one of them.")
    return line, options
