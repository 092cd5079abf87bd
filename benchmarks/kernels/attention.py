"""Attention backends side by side, over page sizes: one layer, microseconds, as `attention.backend: auto` measures it.

    python benchmarks/kernels/attention.py --pages 16,32,64 --models qwen3-0.6b,llama-3.1-8b --json FILE

Decode is a captured pass of eight calls, prefill is launched call by call. What FlashInfer has not compiled shows as –;
`--wait` gives its compilers so many seconds first. Mostly Triton compiles, where its cache is empty.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from fluentllm.assembly.attention import candidates
from fluentllm.assembly.attention.timing import able, compare, points
from fluentllm.core.plugins import PluginManager
from fluentllm.core.protocols import PHASES, AttentionSpec
from fluentllm.core.settings import Settings
from fluentllm.core.types import ModelSpec
from fluentllm.hub.config import architecture

MODELS = Path(__file__).resolve().parents[1] / "gpu" / "models"
DEVICE = torch.device("cuda")


def spec_of(name: str, plugins: PluginManager) -> ModelSpec:
    config = json.loads((MODELS / name / "config.json").read_text())
    spec: ModelSpec = plugins.registry("models").get(architecture(config)).factory.spec(config)
    return spec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", default="16,32,64")
    parser.add_argument("--models", default="qwen3-0.6b,llama-3.1-8b")
    parser.add_argument("--wait", type=float, default=0.0)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings, plugins = Settings(), PluginManager.load({"executor", "cli"}, strict=False)
    print(torch.cuda.get_device_name(DEVICE), "torch", torch.__version__, "CUDA", torch.version.cuda)
    print(f"{'model':16}{'page':>5}  {'':8}{'point':16}  backend µs")
    rows = []
    for name in chosen.models.split(","):
        model = spec_of(name, plugins)
        for page in map(int, chosen.pages.split(",")):
            spec = AttentionSpec(
                model=model, device="cuda", dtype="bfloat16", kv_dtype="bfloat16", page_size=page, deterministic=False
            )
            for phase in PHASES:
                asked = replace(spec, phases=(phase,))
                entries = [entry for entry in candidates(settings, spec, plugins, phase) if entry.name != "torch"]
                wanted = points(phase, model.max_position)
                until = time.monotonic() + chosen.wait
                while len(able(settings, asked, entries, DEVICE, wanted[0])) < len(entries) and time.monotonic() < until:
                    time.sleep(1)
                times = compare(settings, asked, entries, DEVICE, wanted)
                for point in map(str, wanted):
                    each = {entry.name: times.get(point, {}).get(entry.name) for entry in entries}
                    rows.append({"model": name, "page_size": page, "phase": phase, "point": point, **each})
                    shown = "  ".join(f"{backend} {'–' if us is None else format(us, '.1f')}" for backend, us in each.items())
                    print(f"{name:16}{page:5}  {phase:8}{point:16}  {shown}", flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
