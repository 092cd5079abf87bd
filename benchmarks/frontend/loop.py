"""What the engine's loop takes of the host a step, with many requests running: plan, launch, collect, encode the frame.

    python benchmarks/frontend/loop.py --streams 256 --steps 400

The executor here answers at once with one token a request, so what is left is the loop: scheduler, pages, accounting and the
msgpack frame of each step. CPU time, not wall clock.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path

import msgspec

from fluentllm.assembly import assemble, load_model
from fluentllm.core.config import load
from fluentllm.core.engine import Engine
from fluentllm.core.executor import Executor
from fluentllm.core.plugins import PluginManager
from fluentllm.core.types import FromEngine, Request, SamplingParams, SlotResult, StepPlan, StepResult
from fluentllm.hub import resolve

CONFIG = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96},
    **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 160},
    **{"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "eos_token_id": 2, "bos_token_id": 1},
}


class Instant(Executor):
    """Runs nothing: each request gets one token a step."""

    def __init__(self, real: Executor) -> None:
        self.real = real
        self.generations: dict[int, int] = {}
        self.steps = 0

    def launch(self, plan: StepPlan) -> Future[StepResult]:
        self.steps += 1
        self.generations |= {init.slot: init.generation for init in plan.admit}
        slots = [*(chunk.slot for chunk in plan.prefill if chunk.last), *plan.decode]
        done: Future[StepResult] = Future()
        results = [SlotResult(slot, self.generations[slot], [7], None) for slot in slots]
        done.set_result(StepResult(step=plan.step, slots=results, seconds=0.0))
        return done

    def close(self) -> None:
        self.real.close()


def build(folder: Path, streams: int) -> Engine:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    given = {"model.name": str(folder), "model.load_format": "dummy", "engine.device": "cpu", "engine.threads": 1}
    settings = load(None, {**given, "scheduler.max_running": streams, "scheduler.prefill_tokens": 65536}, {}).settings
    files, plugins = resolve(str(folder)), PluginManager.load({"engine", "executor"}, allow=[])
    engine = assemble(settings, "tiny", load_model(settings, files, plugins), plugins)
    engine.executor = Instant(engine.executor)
    return engine


async def measure(engine: Engine, streams: int, steps: int) -> float:
    """Seconds of CPU a step."""
    encode = msgspec.msgpack.Encoder().encode

    def deliver(message: FromEngine) -> None:
        encode(message)

    connection = engine.connect(deliver)
    rng = random.Random(0)
    for number in range(streams):
        prompt = rng.choices(range(3, 160), k=128)
        connection.submit(Request(id=f"r{number}", prompt=prompt, params=SamplingParams(max_tokens=1500, ignore_eos=True)))
    running = asyncio.create_task(engine.run())
    while engine.executor.steps < 20:
        await asyncio.sleep(0)
    first, started = engine.executor.steps, time.process_time()
    while engine.executor.steps < first + steps:
        await asyncio.sleep(0)
    seconds = (time.process_time() - started) / (engine.executor.steps - first)
    connection.close()
    engine.stop()
    await running
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engine = build(Path(folder), args.streams)
        seconds = asyncio.run(measure(engine, args.streams, args.steps))
    print(f"{args.streams} requests: {seconds * 1e6:.0f} µs of CPU a step, {seconds / args.streams * 1e9:.0f} ns a request")


if __name__ == "__main__":
    main()
