"""`fluent serve [MODEL]`: settings from the command line, then the supervisor."""

from __future__ import annotations

import typer

from . import options


def serve(
    model: options.Model = None,
    host: options.Host = None,
    port: options.Port = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    weight_precision: options.WeightPrecision = None,
    load_format: options.LoadFormat = None,
    max_model_len: options.MaxModelLen = None,
    served_name: options.ServedName = None,
    revision: options.Revision = None,
    api_key: options.ApiKey = None,
    overlap_depth: options.OverlapDepth = None,
    deterministic: options.Deterministic = None,
    threads: options.Threads = None,
    scheduler: options.Policy = None,
    kv_dtype: options.KVDtype = None,
    kv_memory: options.KVMemory = None,
    speculative: options.Speculative = None,
    speculative_model: options.SpeculativeModel = None,
    speculative_k: options.SpeculativeK = None,
    role: options.Role = None,
    log_level: options.LogLevel = None,
    config: options.Config = None,
    sets: options.Sets = None,
) -> None:
    """Serve a model over HTTP, with OpenAI's API. Without MODEL: the small default model, fetched at the first start.

    Every flag is a setting of the config file too; `fluent config schema` lists them all.
    """
    given = {
        "model.name": model,
        "server.host": host,
        "server.port": port,
        "engine.device": device,
        "model.dtype": dtype,
        "model.weight_precision": weight_precision,
        "model.load_format": load_format,
        "model.max_model_len": max_model_len,
        "model.served_name": served_name,
        "model.revision": revision,
        "server.api_key": api_key,
        "engine.overlap_depth": overlap_depth,
        "engine.deterministic": deterministic,
        "engine.threads": threads,
        "scheduler.policy": scheduler,
        "kv.dtype": kv_dtype,
        "kv.memory": kv_memory,
        **options.speculation(speculative, speculative_model, speculative_k),
        "disaggregation.role": role,
        "log.level": log_level,
    }
    loaded = options.load(config, given, sets)

    from fluentllm.processes.supervisor import serve as serve_forever

    serve_forever(loaded.settings)


def register(app: typer.Typer) -> None:
    app.command()(serve)
