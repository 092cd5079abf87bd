"""SmolLM2 on this CPU: our engine, `transformers.generate` and, where it is installed, llama.cpp, on the same work in one run.

    python benchmarks/cpu/against_transformers.py --batch 1,8 --ctx 128 --steps 64 --json FILE

`--fifo` (root, Linux) is for a machine that others use: all threads of this process run before theirs, the same for every
contender, with pauses in which the others run.

TPOT is (time for steps + 1 new tokens − time for 1) / steps, the median of three rounds after a warm-up; every prompt is
fresh and random. llama.cpp (`pip install llama-cpp-python`) runs the same GGUF, one stream.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ops import run_before_others
from transformers import LlamaConfig, LlamaForCausalLM

from fluentllm.bench import offline, report
from fluentllm.core.config import load
from fluentllm.hub import load_config, resolve
from fluentllm.kernels.copies import COPIES
from fluentllm.local import LocalEngine
from fluentllm.plugins.weights_gguf.checkpoint import GGUFCheckpoint

ROUNDS = 3
FIFO = "--fifo"
PAUSE = {False: 0.0, True: 2.0}
"""Seconds before each run, by `--fifo`."""


def transformers_model(dtype: torch.dtype) -> LlamaForCausalLM:
    """Transformers' own model with the weights of our default checkpoint."""
    files = resolve("smollm2")
    config = LlamaConfig(**{k: v for k, v in load_config(files).items() if k not in ("architectures", "model_type")})
    model = LlamaForCausalLM(config).to(dtype).eval()
    checkpoint = GGUFCheckpoint(files.path)
    device = torch.device("cpu")
    state = {name: checkpoint.read(name, device).to(dtype) for name in checkpoint.shapes()}
    missing, extra = model.load_state_dict(state, strict=False)
    assert not extra, extra
    assert set(missing) <= {"lm_head.weight"}, missing
    model.tie_weights()
    return model


def tpot(run: Callable[[int], None], steps: int) -> float:
    """Seconds a step; `run(n)` generates n new tokens for a whole batch."""
    firsts, alls = [], []
    for number in range(ROUNDS + 1):
        for new, times in ((1, firsts), (steps + 1, alls)):
            time.sleep(PAUSE[FIFO in sys.argv])
            started = time.perf_counter()
            run(new)
            if number:
                times.append(time.perf_counter() - started)
    return (statistics.median(alls) - statistics.median(firsts)) / steps


def time_transformers(dtype: torch.dtype, batches: list[int], context: int, steps: int) -> dict[int, float]:
    model = transformers_model(dtype)

    def run(batch: int, new: int) -> None:
        prompt = torch.randint(0, model.config.vocab_size, (batch, context))
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=new,
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )

    with torch.inference_mode():
        return {batch: tpot(lambda new, batch=batch: run(batch, new), steps) for batch in batches}


def time_ours(batches: list[int], context: int, steps: int, settings: dict[str, Any]) -> dict[int, float]:
    with LocalEngine(load(None, {"model.name": "smollm2", **settings}, {}).settings) as local:
        COPIES.wait()
        rows = []
        for batch in batches:
            time.sleep(PAUSE[FIFO in sys.argv])
            rows += offline.latency(local, [batch], context, steps, rounds=ROUNDS, tell=lambda line: None)
    return {row["batch"]: row["tpot_ms"] / 1e3 for row in rows}


def time_llama_cpp(context: int, steps: int) -> dict[int, float]:
    from llama_cpp import Llama

    model = Llama(str(resolve("smollm2").path), n_ctx=context + steps + 8, n_threads=torch.get_num_threads(), verbose=False)

    def run(new: int) -> None:
        model.reset()
        tokens = model.generate(random.choices(range(model.n_vocab()), k=context), temp=0.0)
        for _ in range(new):
            next(tokens)

    return {1: tpot(run, steps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--ctx", type=int, default=128)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument(FIFO, action="store_true", help="run before all other processes (root, Linux), with pauses")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.fifo:
        # Threads that start later are scheduled like this one. Nothing may compute here before: OpenMP gives each thread that
        # does workers of its own, and with more workers than cores none of them spins, which doubles the time of our steps.
        run_before_others()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, load average {os.getloadavg()[0]:.1f} at the start")
    batches = [int(part) for part in args.batch.split(",")]

    work = (batches, args.ctx, args.steps)
    contenders: dict[str, Callable[[], dict[int, float]]] = {
        "fluentllm": lambda: time_ours(*work, {}),
        "fluentllm, torch's operations": lambda: time_ours(*work, {"engine.native": False}),
        "fluentllm float32": lambda: time_ours(*work, {"model.weight_precision": "float32"}),
        "transformers float32": lambda: time_transformers(torch.float32, *work),
        "transformers bfloat16": lambda: time_transformers(torch.bfloat16, *work),
        "llama.cpp": lambda: time_llama_cpp(args.ctx, args.steps),
    }
    results: dict[str, dict[int, float]] = {}
    for name, measure in contenders.items():
        try:
            results[name] = measure()
        except ImportError as error:
            print(f"{name:30} not measured: {error}")
            continue
        speeds = "  ".join(f"batch {b}: {s * 1e3:7.2f} ms, {b / s:7.1f} tok/s" for b, s in results[name].items())
        print(f"{name:30} {speeds}", flush=True)
    for batch in batches:
        best = max(batch / results[f"transformers {dtype}"][batch] for dtype in ("float32", "bfloat16"))
        print(f"batch {batch}: {batch / results['fluentllm'][batch] / best:.2f} × transformers' better figure")
    if args.json:
        run = {"ctx": args.ctx, "steps": args.steps, "fifo": args.fifo, "load": os.getloadavg()}
        figures = {**run, "tpot_s": results, **report.environment()}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
