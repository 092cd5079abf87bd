"""What the benchmarks here share: options that name a model and its memory, and the engine that they give."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fluentllm.core.config import load
from fluentllm.local import LocalEngine


def parser(about: str | None) -> argparse.ArgumentParser:
    """With --model, --load-format, --kv-memory and --json."""
    found = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", required=True)
    found.add_argument("--load-format", default="dummy")
    found.add_argument("--kv-memory")
    found.add_argument("--json", type=Path)
    return found


def engine(args: argparse.Namespace, settings: dict[str, Any]) -> LocalEngine:
    """By these options and by dotted settings; None of either leaves the default."""
    given = {"model.name": args.model, "model.load_format": args.load_format, "kv.memory": args.kv_memory, **settings}
    return LocalEngine(load(None, {name: value for name, value in given.items() if value is not None}, {}).settings)
