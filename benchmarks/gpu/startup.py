"""Start to first token on a GPU with an empty and with a warm kernel cache, and what the start consists of.

    python benchmarks/gpu/startup.py [MODEL_FOLDER] [--from-files]

Weights are dummy ones, made on the GPU; with --from-files they are written to safetensors files first, and read from there:
from the page cache, if memory is large enough. Each start is a process of its own; the cache folders are temporary. Prints a
table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

SHARD_BYTES = 4 << 30


def write_checkpoint(model: Path, folder: Path, device: str) -> int:
    """The dummy weights of a configuration, drawn on `device`, as safetensors files of some `SHARD_BYTES` → bytes."""
    import torch
    from safetensors.torch import save_file

    from fluentllm.assembly.kernels import without_memory
    from fluentllm.core.plugins import PluginManager
    from fluentllm.core.protocols import BuildContext
    from fluentllm.hub import resolve
    from fluentllm.kernels import choose_ops
    from fluentllm.plugins.weights_dummy.checkpoint import DummyCheckpoint

    config = json.loads((model / "config.json").read_text())
    family = PluginManager.load({"executor"}, allow=[], deny=[]).registry("models").get(config["architectures"][0]).factory
    place = torch.device(device)
    context = BuildContext(device=place, dtype=torch.bfloat16, ops=choose_ops(place, deterministic=False), max_positions=16)
    built = without_memory(family, config, context)
    if built is None:
        raise SystemExit(f"{model} cannot be built without memory.")
    weights = DummyCheckpoint(model, list(built.weight_slots()), "bfloat16", 0)
    shutil.copytree(model, folder, dirs_exist_ok=True)
    shutil.copy(resolve("longcat-nano").path / "tokenizer.json", folder)  # files are served with one, whatever is in it
    shards, size, whole = [{}], 0, 0
    for name in weights.shapes():
        tensor = weights.read(name, place).cpu().clone()
        if size and size + tensor.nbytes > SHARD_BYTES:
            save_file(shards[-1], folder / f"model-{len(shards):05}.safetensors")
            shards[-1].clear()
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size, whole = size + tensor.nbytes, whole + tensor.nbytes
    save_file(shards[-1], folder / f"model-{len(shards):05}.safetensors")
    weights.close()
    if place.type == "cuda":
        torch.cuda.empty_cache()
    return whole


def start(model: str, cache: str, device: str, load_format: str) -> dict[str, object]:
    """Figures of one start, its timeline among them."""
    figures = Path(cache) / "figures.json"
    command = [
        sys.executable,
        "-m",
        "fluentllm.cli",
        "bench",
        "latency",
        model,
        "--load-format",
        load_format,
        "--device",
        device,
    ]
    command += ["--batch", "1", "--ctx", "16", "--steps", "16", "--json", str(figures)]
    environment = {**os.environ, "TRITON_CACHE_DIR": f"{cache}/triton", "FLUENT_CACHE": cache}
    subprocess.run(command, check=True, env=environment)
    found: dict[str, object] = json.loads(figures.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=HERE / "models" / "llama-3.1-8b")
    parser.add_argument("--from-files", action="store_true", help="write the weights to files first, and read them")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    model, load_format, size = str(options.model), "dummy", 0
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as folder:
        if options.from_files:
            size = write_checkpoint(options.model, Path(folder), options.device)
            model, load_format = folder, "safetensors"
        runs = {run: start(model, cache, options.device, load_format) for run in ("cold", "warm")}
    names = list(dict.fromkeys(stage["name"] for run in runs.values() for stage in run["startup"]))  # type: ignore[attr-defined]
    print(f"\n{options.model}\n{'stage':<28} {'cold s':>14} {'warm s':>14}")
    for name in names:
        cells = []
        for run in runs.values():
            stage = next((s for s in run["startup"] if s["name"] == name), None)  # type: ignore[attr-defined]
            cells.append(f"{stage['start']:6.2f}–{stage['end']:6.2f}" if stage else "")
        print(f"{name:<28} {cells[0]:>14} {cells[1]:>14}")
    if size:
        seconds = next(s["end"] - s["start"] for s in runs["warm"]["startup"] if s["name"] == "weights")  # type: ignore[attr-defined]
        print(f"{size / 1e9:.1f} GB of weights from files at {size / seconds / 1e9:.1f} GB/s, warm")
    print(f"{'first token after':<28} {runs['cold']['startup_s']:>14.2f} {runs['warm']['startup_s']:>14.2f}")


if __name__ == "__main__":
    main()
