"""Every setting of FluentLLM, in one tree of Structs: the only place of defaults, units and help texts.

`core/config` fills the tree from one YAML or TOML file, the environment (`FLUENT_SERVER__PORT=8001`) and the command line.
Plugins add their own Structs under `plugins.<name>`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

LEAST_CONTEXT = 8
"""Tokens that `model.max_model_len` is at least."""


def _help(text: str, unit: str | None = None, **bounds: Any) -> Meta:
    return Meta(description=text, extra_json_schema={"unit": unit} if unit else None, **bounds)


class ModelSettings(Struct, kw_only=True, forbid_unknown_fields=True):
    name: Annotated[str, _help("A default's name, a folder, a .gguf file or a Hugging Face id.")] = "smollm2"
    served_name: Annotated[str | None, _help("Name at the API; the model's own name if null.")] = None
    revision: Annotated[str | None, _help("Branch, tag or commit of a Hugging Face id.")] = None
    load_format: Annotated[
        str,
        _help(
            "Checkpoint reader, by the name a plugin gave it: safetensors, gguf, torch, dummy for random weights; auto looks."
        ),
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        _help("Activations and unpacked weights. auto: float32 on a CPU, bfloat16 on a GPU."),
    ] = "auto"
    weight_precision: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "int8", "int4", "packed", "fp8"],
        _help(
            "Matrix weights, see docs/models.md. auto: packed on a CPU; on a GPU, or deterministic, the activations' dtype, "
            "but block-FP8 checkpoints stay FP8 on Hopper."
        ),
    ] = "auto"
    max_model_len: Annotated[
        Annotated[int, Meta(ge=LEAST_CONTEXT)] | None,
        _help("Longest context, prompt and answer; the checkpoint's if null.", "tokens"),
    ] = None
    chat_template: Annotated[str | None, _help("Path of a Jinja chat template instead of the checkpoint's.")] = None
    answer_format: Annotated[
        str,
        _help(
            "How the model writes tool calls and reasoning, by the name a plugin gave it: hermes, longcat, llama3_json, "
            "mistral, deepseek_v3; auto looks at the chat template; none."
        ),
    ] = "auto"


class ServerSettings(Struct, kw_only=True, forbid_unknown_fields=True):
    host: Annotated[str, _help("Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, _help("Port; 0 takes a free one.", ge=0, le=65535)] = 8000
    api_key: Annotated[
        str | None, _help("If set, every request but /health and /live needs `Authorization: Bearer <key>`.")
    ] = None
    max_body_bytes: Annotated[int, _help("Larger bodies are refused with 413.", "bytes", ge=1024)] = 32 * 1024 * 1024
    body_timeout: Annotated[float, _help("A body that takes longer to arrive is refused with 408.", "seconds", gt=0)] = 60.0
    max_choices: Annotated[int, _help("Largest `n` of one request.", ge=1)] = 128
    tokenizer_threads: Annotated[int, _help("Threads that render and tokenize.", ge=1)] = 2
    shutdown_timeout: Annotated[float, _help("How long running requests may finish after a stop signal.", "seconds", ge=0)] = (
        10.0
    )


class EngineSettings(Struct, kw_only=True, forbid_unknown_fields=True):
    device: Annotated[str, _help("auto, cpu, cuda, cuda:N. auto takes a GPU where there is one.")] = "auto"
    overlap_depth: Annotated[int, _help("Steps launched ahead of what has been read.", "steps", ge=0, le=2)] = 1
    deterministic: Annotated[bool, _help("Fixed-order arithmetic: a token does not depend on what else runs. Slower.")] = False
    cuda_graphs: Annotated[bool, _help("Capture step programs on a GPU; off: launch each kernel by itself.")] = True
    capture_when_idle: Annotated[
        bool,
        _help("On a GPU capture the programs that requests may need next while there are none; off: each when it is needed."),
    ] = True
    moe_overlap: Annotated[
        Literal["auto", "on", "off"],
        _help(
            "LongCat on a GPU: in decode the experts run on a second stream, beside the attention and dense layers that do not "
            "need them. auto: on, which was measured to be faster at every batch. No effect elsewhere."
        ),
    ] = "auto"
    memory_share: Annotated[
        float,
        _help("How much of a GPU's memory may be in use, by weights, the largest step, the KV pool and others.", gt=0, le=1),
    ] = 0.9
    threads: Annotated[Annotated[int, Meta(ge=1)] | None, _help("CPU threads of the executor; all cores if null.")] = None
    native: Annotated[
        bool,
        _help("On a CPU use C kernels, compiled at the first start where a C compiler is found; torch's operations if false."),
    ] = True
    max_restarts: Annotated[int, _help("Restarts of a process in ten minutes; one crash more ends the server.", ge=0)] = 5
    hang_timeout: Annotated[float, _help("A step that takes longer is a hang: the engine is restarted.", "seconds", gt=0)] = (
        300.0
    )


class SchedulerSettings(Struct, kw_only=True, forbid_unknown_fields=True):
    policy: Annotated[str, _help("Scheduling policy, by the name a plugin gave it.")] = "fcfs"
    max_running: Annotated[
        Annotated[int, Meta(ge=1)] | None, _help("Sequences on the device at once. auto: 64 on a CPU, 256 on a GPU.")
    ] = None
    max_waiting: Annotated[int, _help("Bound of the queue; beyond it requests get 429.", ge=1)] = 4096
    prefill_tokens: Annotated[
        Annotated[int, Meta(ge=16)] | None,
        _help("Most prompt tokens computed in one step. auto: 512 on a CPU, 8192 on a GPU.", "tokens"),
    ] = None
    max_step_ratio: Annotated[
        Annotated[float, Meta(gt=1)] | None,
        _help(
            "While requests decode, a step with prompt tokens takes at most this many times a step without; or longer by what "
            "launching it takes the host, or 1.5 times what it takes with hardly any. auto: 4 on a GPU, no bound on a CPU."
        ),
    ] = None
    prefill_first: Annotated[
        bool,
        _help(
            "While a prompt can be computed, nobody decodes: more tokens a second where many requests come at once, and longer "
            "gaps between tokens, which max_step_ratio then does not bound."
        ),
    ] = False


class KVSettings(Struct, kw_only=True, forbid_unknown_fields=True):
    page_size: Annotated[Annotated[int, Meta(ge=1)] | None, _help("Tokens a page. auto: 16, 64 for MLA.", "tokens")] = None
    memory: Annotated[
        Annotated[str, Meta(pattern=r"^\s*\d+(\.\d+)?\s*(([kKmMgGtT][iI]?)?[bB])?\s*$", examples=["2GiB", "500MB"])] | None,
        _help("Size of the KV pool; planned from what is free if null."),
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "fp8"],
        _help(
            "What keys and values are kept in. auto: the activations' dtype. fp8: E4M3, and for MLA the latent alone, with a "
            "scale a token (docs/kernels.md)."
        ),
    ] = "auto"
    prefix_cache: Annotated[bool, _help("Keep finished prompts' pages in a radix tree.")] = True


class AttentionSettings(Struct, kw_only=True, forbid_unknown_fields=True):
    backend: Annotated[str, _help("Attention backend by name; auto takes the fastest here, by measurement.")] = "auto"
    prefill_backend: Annotated[
        str | None, _help("Another one for prefill, by name or auto; the same as for decode if null.")
    ] = None


MOST_DRAFTS = 7
"""A step that verifies so many computes eight rows of each sequence, which is what kernels are made for."""


class SpeculativeSettings(Struct, kw_only=True, forbid_unknown_fields=True):
    method: Annotated[str, _help("Who drafts, by the name a plugin gave it, such as pld; none turns speculation off.")] = "none"
    model: Annotated[
        str | None,
        _help("A draft model for methods that need one (eagle): a folder or a Hugging Face id; the default's own if null."),
    ] = None
    k: Annotated[
        Annotated[int, Meta(ge=0, le=MOST_DRAFTS)] | Literal["auto"],
        _help("Drafts a step, max_k at most; auto picks 0 … max_k by measured times and acceptance."),
    ] = "auto"
    max_k: Annotated[int, _help("Most drafts a step.", ge=1, le=MOST_DRAFTS)] = 4
    min_acceptance: Annotated[
        float,
        _help(
            "If a smaller share of first drafts is right, drafting stops for a while and the log says so. 0: never.", ge=0, le=1
        ),
    ] = 0.02
    synthetic_acceptance: Annotated[
        Annotated[float, Meta(ge=1, le=8)] | None,
        _help("For benchmarks on random weights only: accept drafts at random, this many tokens a step. Answers mean nothing."),
    ] = None

    def __post_init__(self) -> None:
        if self.k != "auto" and self.k > self.max_k:
            most = f", or raise max_k (at most {MOST_DRAFTS})" if self.max_k < MOST_DRAFTS else ""
            raise ValueError(f"k is {self.k}, and max_k {self.max_k}: use auto or 0 … {self.max_k}{most}")


class GrammarSettings(Struct, kw_only=True, forbid_unknown_fields=True):
    states: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        _help(
            "States of all grammars in use at once that are tables; what 64 MiB of device memory hold if null. None without "
            "plugins that make tables: grammar_xgrammar makes none."
        ),
    ] = None


class DisaggregationSettings(Struct, kw_only=True, forbid_unknown_fields=True):
    """Prefill and decode on different engines; how is the method's own affair, at `plugins.kv_layerwise`."""

    role: Annotated[
        Literal["prefill", "decode", "both"],
        _help("prefill: compute prompts for others; decode: continue what others computed; both: an engine that does all."),
    ] = "both"
    method: Annotated[str, _help("Who hands requests over, by the name a plugin gave it.")] = "layerwise"
    transport: Annotated[str, _help("What moves KV, by the name a plugin gave it: nixl, mooncake, loopback.")] = "nixl"


class LogSettings(Struct, kw_only=True, forbid_unknown_fields=True):
    level: Annotated[Literal["debug", "info", "warning", "error"], _help("Least severity that is printed.")] = "info"
    requests: Annotated[bool, _help("One line for each finished request.")] = False


class PluginSettings(Struct, kw_only=True, forbid_unknown_fields=True):
    """Next to these two, every plugin's own settings are at `plugins.<name>`."""

    allow: Annotated[
        list[str] | None, _help("Load only these third-party plugins; all if null, none if empty. Built-ins always load.")
    ] = None
    deny: Annotated[list[str], _help("Never load these, built-in or not.")] = field(default_factory=list)


class Settings(Struct, kw_only=True, forbid_unknown_fields=True):
    model: ModelSettings = field(default_factory=ModelSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    kv: KVSettings = field(default_factory=KVSettings)
    attention: AttentionSettings = field(default_factory=AttentionSettings)
    speculative: SpeculativeSettings = field(default_factory=SpeculativeSettings)
    grammar: GrammarSettings = field(default_factory=GrammarSettings)
    disaggregation: DisaggregationSettings = field(default_factory=DisaggregationSettings)
    log: LogSettings = field(default_factory=LogSettings)
    plugins: PluginSettings = field(default_factory=PluginSettings)
    plugin: dict[str, Any] = field(default_factory=dict)
    """Filled by `core/config/loading.py` from `plugins.<name>`: plugin name → its own Struct."""
