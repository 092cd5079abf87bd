"""`fluent bench latency|throughput|serve|step`: measure, print, and write `--json`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import ConfigError
from . import bench_step, options, output
from .server import root

if TYPE_CHECKING:
    from ..bench.offline import Drafts
    from ..core.settings import Settings
    from ..local import LocalEngine

bench = typer.Typer(help="Measure latency, throughput, or a running server.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    bench_step.register(bench)
    app.add_typer(bench, name="bench")


@bench.command()
@options.configured(options.ENGINE)
def latency(
    settings: Settings,
    batch: Annotated[str, typer.Option(help="Batch sizes, such as 1,8,32.")] = "1,8,32",
    ctx: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="New tokens that are timed.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="How often, after a warm-up; medians count.")] = 3,
    json: output.FiguresFile = None,
    compare_deterministic: Annotated[
        bool,
        typer.Option(
            "--compare-deterministic",
            help="Time an engine with and one without engine.deterministic in turns, and print the slowdown.",
            show_default=False,
        ),
    ] = False,
) -> None:
    """Time of a decode step at each batch size, on fresh random prompts."""
    from ..bench import beside, offline

    batches = [_positive("--batch", part) for part in batch.split(",")]
    if compare_deterministic:
        settings, others = beside.pair(settings, max(batches))
    elif settings.engine.deterministic:
        typer.echo("deterministic mode: --compare-deterministic measures its slowdown")

    def measure(local: LocalEngine, drafts: Drafts) -> dict[str, Any]:
        with beside.Beside(others) if compare_deterministic else nullcontext() as other:
            return {"decode": offline.latency(local, batches, ctx, steps, rounds, typer.echo, drafts, other)}

    _offline(settings, measure, json)


@bench.command()
@options.configured(options.ENGINE)
def throughput(
    settings: Settings,
    requests: Annotated[int, typer.Option(min=1, help="Requests, all at once.")] = 256,
    input_len: Annotated[str, typer.Option(help="Prompt tokens: N, or A:B for uniform.")] = "100:1024",
    output_len: Annotated[str, typer.Option(help="New tokens: N, or A:B for uniform.")] = "100:1024",
    seed: Annotated[int, typer.Option(help="Of lengths and prompts.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="How often; the last counts, when all is compiled and captured.")] = 1,
    json: output.FiguresFile = None,
) -> None:
    """Tokens a second with all requests sent at once, end of sequence ignored."""
    from ..bench import offline

    inputs, outputs = _range("--input-len", input_len), _range("--output-len", output_len)

    def measure(local: LocalEngine, drafts: Drafts) -> dict[str, Any]:
        figures = offline.throughput(local, requests, inputs, outputs, seed, drafts, rounds)
        before = "".join(f" (before: {rate:.1f})" for rate in figures["rounds_tok_s"][:-1])
        total = f"{requests} requests, {figures['out_tokens']} tokens in {figures['s']:.1f} s"
        typer.echo(f"{total}: {figures['tok_s']:.1f} tok/s{before}")
        return {"throughput": figures}

    _offline(settings, measure, json)


@bench.command()
def serve(
    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000",
    requests: Annotated[int, typer.Option(min=1, help="How many.")] = 64,
    rate: Annotated[float, typer.Option(min=0, help="Requests a second, arriving at random; 0 sends all at once.")] = 1.0,
    input_len: Annotated[str, typer.Option(help="Prompt tokens: N, or A:B for uniform.")] = "32:256",
    output_len: Annotated[str, typer.Option(help="New tokens: N, or A:B for uniform.")] = "16:128",
    seed: Annotated[int, typer.Option(help="Of arrivals, lengths and prompts.")] = 1,
    ttft_goal: Annotated[float, typer.Option(min=0, help="A good request's first token comes within this many ms.")] = 2000.0,
    tpot_goal: Annotated[float, typer.Option(min=0, help="And its tokens within this many ms each.")] = 200.0,
    api_key: options.ServerKey = None,
    json: output.FiguresFile = None,
    config: options.Config = None,
    sets: options.Sets = None,
) -> None:
    """Load on a running server, arriving at random whether or not it keeps up: TTFT, TPOT, ITL percentiles and goodput."""
    import asyncio

    from ..bench import online, report

    load = online.Load(
        url=root(url),
        requests=requests,
        rate=rate,
        inputs=_range("--input-len", input_len),
        outputs=_range("--output-len", output_len),
        seed=seed,
        ttft_goal=ttft_goal / 1e3,
        tpot_goal=tpot_goal / 1e3,
        api_key=options.load(config, {"server.api_key": api_key}, sets).settings.server.api_key,
    )
    figures = asyncio.run(online.measure(load))
    output.mark(figures["synthetic"])
    for name in ("ttft_ms", "tpot_ms", "itl_ms"):
        typer.echo(f"{name:8} " + "  ".join(f"{k} {v:8.1f}" for k, v in figures[name].items()))
    typer.echo(
        f"{figures['requests']} requests ({figures['failed']} failed) in {figures['s']:.1f} s: {figures['tok_s']:.1f} tok/s, "
        f"goodput {figures['goodput_requests_s']:.2f} requests/s"
    )
    for error in figures["errors"]:
        typer.echo(f"failed: {error}", err=True)
    report.write(json, {"url": url, "serve": figures, **report.environment(figures["synthetic"])})


def _offline(settings: Settings, measure: Callable[[LocalEngine, Drafts], dict[str, Any]], json: Path | None) -> None:
    from msgspec import to_builtins

    from ..bench import offline, report
    from ..core.timeline import lines
    from ..local import LocalEngine
    from ..settling import settle

    drafts = offline.Drafts()
    with LocalEngine(settings) as local:
        offline.startup(local)
        stages = local.timeline.stages
        startup_s = stages[-1].end
        settle()
        typer.echo(f"{local.model_name} on {local.engine.info.device}: first token after {startup_s:.2f} s")
        for line in lines(stages):
            typer.echo(f"start of the {line}")
        info = local.engine.info.speculative
        synthetic = local.engine.info.synthetic
        output.mark(synthetic)
        figures = {
            "model": settings.model.name,
            "startup_s": startup_s,
            "startup": to_builtins(stages),
            **measure(local, drafts),
        }
        figures["speculative"] = drafts.report(info) if info is not None else None
        if info is not None:
            typer.echo(f"in all: {drafts.line(info)}")
    report.write(json, {**figures, **report.environment(synthetic)})


def _positive(option: str, text: str) -> int:
    if not text.strip().isdigit() or int(text) == 0:
        raise ConfigError(f"{option} holds {text!r}.", fix="Use positive whole numbers, such as 1,8,32.")
    return int(text)


def _range(option: str, text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    bounds = _positive(option, low), _positive(option, high or low)
    if bounds[0] > bounds[1]:
        raise ConfigError(f"{option} is {text!r}.", fix=f"Write the smaller first: {bounds[1]}:{bounds[0]}.")
    return bounds
