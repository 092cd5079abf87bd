"""Start to first token on a GPU with an empty and with a warm kernel cache, and what the start consists of.

    python benchmarks/gpu/startup.py [MODEL_FOLDER]

Dummy weights, made on the GPU. Each start is a process of its own; the cache folders are temporary. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def start(model: str, cache: str) -> dict[str, object]:
    """Figures of one start, its timeline among them."""
    figures = Path(cache) / "figures.json"
    command = [sys.executable, "-m", "fluentllm.cli", "bench", "latency", model, "--load-format", "dummy", "--device", "cuda"]
    command += ["--batch", "1", "--ctx", "16", "--steps", "16", "--json", str(figures)]
    environment = {**os.environ, "TRITON_CACHE_DIR": f"{cache}/triton", "FLUENT_CACHE": cache}
    subprocess.run(command, check=True, env=environment)
    found: dict[str, object] = json.loads(figures.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(HERE / "models" / "llama-3.1-8b"))
    model = parser.parse_args().model
    with tempfile.TemporaryDirectory() as cache:
        runs = {"cold": start(model, cache), "warm": start(model, cache)}
    names = list(dict.fromkeys(stage["name"] for run in runs.values() for stage in run["startup"]))  # type: ignore[attr-defined]
    print(f"\n{model}\n{'stage':<28} {'cold s':>14} {'warm s':>14}")
    for name in names:
        cells = []
        for run in runs.values():
            stage = next((s for s in run["startup"] if s["name"] == name), None)  # type: ignore[attr-defined]
            cells.append(f"{stage['start']:6.2f}–{stage['end']:6.2f}" if stage else "")
        print(f"{name:<28} {cells[0]:>14} {cells[1]:>14}")
    print(f"{'first token after':<28} {runs['cold']['startup_s']:>14.2f} {runs['warm']['startup_s']:>14.2f}")


if __name__ == "__main__":
    main()
