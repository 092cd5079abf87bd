"""The contract with plugins: every hook there is. Version `API_VERSION`; what each `register` takes is in `protocols`.

A plugin is an object (a module, an instance) whose functions are marked with `@hookimpl`, named by an entry point of
the group `fluentllm.plugins`; the entry point's extras say which processes load it:

    [project.entry-points."fluentllm.plugins"]
    my_policy = "my_package.plugin [engine]"

Hooks resolve once, at start. All are synchronous and may not block; only routes are async.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import typer

    from .protocols import (
        Register,
        RegisterCall,
        RegisterConfig,
        RegisterModel,
        RegisterRoute,
        RegisterWeights,
        RequestEvent,
    )
    from .types import KVEvent, StepPlan, StepResult

PROJECT = "fluent"
ENTRY_POINT_GROUP = "fluentllm.plugins"
API_VERSION = 1
"""A plugin may state `FLUENT_API_VERSION = 1`; another number is refused at start."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def fluent_config(register: RegisterConfig) -> None:
    """Give the plugin's own msgspec Struct: `register(MyConfig)`. Its settings are at `plugins.<plugin name>`."""


@hookspec
def fluent_models(register: RegisterModel) -> None:
    """Give architectures by their Hugging Face name: `register("LlamaForCausalLM", family)`."""


@hookspec
def fluent_weights(register: RegisterWeights) -> None:
    """Give readers of checkpoints: `register("safetensors", factory, supports=...)`."""


@hookspec
def fluent_schedulers(register: Register) -> None:
    """Give scheduling policies: `register("fcfs", factory)`."""


@hookspec
def fluent_attention(register: Register) -> None:
    """Give attention backends: `register("torch", factory, supports=...)`."""


@hookspec
def fluent_proposers(register: Register) -> None:
    """Give proposers of speculative drafts: `register("eagle", factory, supports=...)`."""


@hookspec
def fluent_kv_transports(register: Register) -> None:
    """Give transports that move KV between machines: `register("nixl", factory, supports=...)`."""


@hookspec
def fluent_handoffs(register: Register) -> None:
    """Give ways to hand requests over between prefill and decode engines: `register("layerwise", factory)`."""


@hookspec
def fluent_grammars(register: Register) -> None:
    """Give compilers of grammars, by the kind that a request asks for: `register("regex", factory, supports=...)`."""


@hookspec
def fluent_answer_formats(register: Register) -> None:
    """Give formats of answers, how a model writes tool calls and reasoning: `register("hermes", factory, supports=...)`.
    Front-end process."""


@hookspec
def fluent_routes(register: RegisterRoute) -> None:
    """Give HTTP routes: `register("/v1/models", endpoint, methods=("GET",))`. Front-end process."""


@hookspec
def fluent_calls(register: RegisterCall) -> None:
    """Give calls that a front end can make: `register("metrics", function)`. Engine process; the front end's way to them is
    `EngineClient.call("metrics")`."""


@hookspec
def fluent_commands(app: typer.Typer) -> None:
    """Add subcommands to `fluent`."""


@hookspec
def fluent_step(plan: StepPlan, result: StepResult) -> None:
    """Observe: a step was collected. Engine process."""


@hookspec
def fluent_request(event: RequestEvent) -> None:
    """Observe: a request was queued, scheduled, gave its first token, finished. Engine process."""


@hookspec
def fluent_kv_events(events: list[KVEvent]) -> None:
    """Observe: the prefix cache changed. Engine process."""
