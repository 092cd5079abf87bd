"""What `fluent serve` prints once it can answer: where, what, on what, in how much memory, and a line to try it with."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING

from fluentllm.core.timeline import lines as timeline_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fluentllm.core.types import ModelInfo, SpeculativeInfo, Stage

    from .control import Example

KEY_VARIABLE = "FLUENT_SERVER__API_KEY"


def banner(
    url: str,
    info: ModelInfo,
    *,
    example: Example | None,
    needs_key: bool,
    seconds: float,
    startup: Sequence[Stage] = (),
) -> str:
    """`example`: what to try first; `needs_key`: does the server ask for one; `seconds`: from start to ready; `startup`:
    its stages, of all processes."""
    spec = info.spec
    memory = " + ".join(f"{name.replace('_', ' ')} {size(count)}" for name, count in info.memory.items())
    rows = {
        "URL": f"{url}/v1",
        "model": f"{info.name} ({spec.architecture}, context {info.max_model_len:,} tokens)",
        "device": f"{info.device}, {info.dtype}",
        "weights": info.weight_precision,
        "memory": f"{memory} = {size(sum(info.memory.values()))}",
        "KV pool": f"{info.kv_tokens:,} tokens in pages of {info.page_size}{_kept_in(info)}, {info.slots} sequences at once",
    }
    if info.speculative is not None:
        rows["drafts"] = _drafts(info.speculative)
    lines = [f"\nFluentLLM is ready after {seconds:.1f} s.\n"]
    lines += [f"  {name:<8} {text}" for name, text in rows.items() if text]
    if startup:
        lines += ["", "  start, in seconds since its begin:", *(f"    {line}" for line in timeline_lines(startup))]
    if example is not None:
        lines += ["", "Try it:", "", f"  {curl(url, info.name, example, needs_key=needs_key)}"]
    lines += ["", "Stop it with Ctrl-C."]
    return "\n".join(lines)


def _kept_in(info: ModelInfo) -> str:
    return f", {info.kv_dtype}" if info.kv_dtype else ""


def _drafts(info: SpeculativeInfo) -> str:
    count = f"0 to {info.max_k}" if info.k == "auto" else str(info.k)
    text = f"{info.method}, {count} a step"
    return text if info.synthetic is None else f"{text}; {info.synthetic}"


def curl(url: str, model: str, example: Example, *, needs_key: bool) -> str:
    """A command for a POSIX shell. A key is not printed: it is taken from the variable that also sets it."""
    body: dict[str, object] = {"model": model}
    if example == "chat":
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": "What is the capital of France?"}]
    else:
        path = "/v1/completions"
        body["prompt"] = "The capital of France is"
        body["max_tokens"] = 16
    body["temperature"] = 0
    parts = ["curl", f"{url}{path}", "-H", "'Content-Type: application/json'"]
    if needs_key:
        parts += ["-H", f'"Authorization: Bearer ${KEY_VARIABLE}"']
    return " ".join([*parts, "-d", shlex.quote(json.dumps(body, ensure_ascii=False))])


def size(count: float) -> str:
    """Bytes for people: binary units, as `kv.memory` takes them."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
