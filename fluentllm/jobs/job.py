"""What a job file and the lines of its input and output look like.

input: prompts.jsonl          # {"prompt": "…"} or {"messages": […]} a line; "id" and any sampling field may stand beside
output: results.jsonl
sampling: {max_tokens: 64, temperature: 0}
settings: {model: {name: smollm2}}
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct, field

from ..core.config.sources import ConfigFile
from ..core.config.tree import nearest
from ..core.errors import ConfigError, InvalidRequest
from ..frontend.sampling import SamplingOptions, check_answer


class Job(Struct, kw_only=True):
    """The job file without its settings. Paths are relative to its folder."""

    input: str
    output: str
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """For every line; a line's own fields win."""
    concurrency: Annotated[int, Meta(ge=1)] = 256
    """Lines that are with the engine, or wait for an earlier one to be written."""


SETTINGS = "settings"
"""Key of the settings tree, as in a file of `fluent serve --config`."""


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
    synthetic: str | None = None
    """Set where drafts are accepted at random, for a benchmark: the text means nothing (`ModelInfo.synthetic`)."""


def load_job(path: Path) -> tuple[Job, ConfigFile]:
    """The job, and the part of its file that is settings. Raises `ConfigError` naming the line, the key and what was meant."""
    file = ConfigFile(path)
    content = {key: value for key, value in file.tree.items() if key != SETTINGS}
    _check_keys(file, content, (), [*Job.__struct_fields__, SETTINGS])
    if isinstance(content.get("sampling"), dict):
        _check_keys(file, content["sampling"], ("sampling",), SamplingOptions.__struct_fields__)
    try:
        job = msgspec.convert(content, Job)
    except msgspec.ValidationError as error:
        raise _misfit(file, content, str(error)) from None
    job.input, job.output = (str(path.parent / Path(name).expanduser()) for name in (job.input, job.output))
    return job, file.section(SETTINGS)


def _check_keys(file: ConfigFile, content: dict[str, Any], above: tuple[str, ...], known: Any) -> None:
    for key, value in content.items():
        if key not in known:
            meant = nearest(key, known)
            fix = f"Did you mean {'.'.join((*above, meant))}?" if meant else f"Valid here: {', '.join(known)}."
            where = file.where((*above, key))
            raise ConfigError(f"{where}: unknown key {'.'.join((*above, key))!r} (its value: {value!r}).", fix=fix)


def _misfit(file: ConfigFile, content: Any, said: str) -> ConfigError:
    """msgspec's words (`Expected … - at `$.sampling.top_p``) with the line and the value seen."""
    reason, _, place = said.partition(" - at ")
    path = tuple(re.findall(r"[A-Za-z_]\w*", place))
    value = content
    for key in path:
        value = value.get(key) if isinstance(value, dict) else value
    what = f"{'.'.join(path)} is {value!r}: {reason}." if path else f"{reason}."
    return ConfigError(f"{file.where(path)}: {what}", fix="See docs/jobs.md for what a job file holds.")


def parse_line(text: bytes, defaults: SamplingOptions) -> tuple[Line, SamplingOptions]:
    """Raises `InvalidRequest` for a line that is not one."""
    try:
        content = msgspec.json.decode(text, type=dict[str, Any])
        own = {key: content.pop(key) for key in list(content) if key in SamplingOptions.__struct_fields__}
        unknown = sorted(content.keys() - set(Line.__struct_fields__))
        if unknown:
            known = ", ".join(Line.__struct_fields__)
            raise InvalidRequest(f"Unknown field {unknown[0]!r}.", fix=f"Use {known} or an option of sampling.")
        line = msgspec.convert(content, Line)
        options = msgspec.convert({**msgspec.to_builtins(defaults), **own}, SamplingOptions)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
        raise InvalidRequest(f"Not a line of a job: {error}.", fix="Write one JSON object a line.") from None
    if (line.prompt is None) == (line.messages is None):
        raise InvalidRequest("A line needs either prompt or messages.", fix="Give exactly one of them.")
    return line, check_answer(options)
