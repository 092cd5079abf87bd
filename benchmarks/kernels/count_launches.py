"""Launches of one decode step by name, ours and torch's, with and without drafts. Needs no GPU: the step is recorded on tensors
without memory, as if on a Hopper.

    python benchmarks/kernels/count_launches.py --model benchmarks/gpu/models/deepseek-v3-lite --method mtp --drafts 0,1,3

Layers of a kind launch the same, so few of each are kept (`prewarm.thin`): what counts is the difference between two columns.
Torch's operations are counted as one launch each, views and tensors without values as none.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fluentllm.assembly.kernels import launches_of
from fluentllm.core import config
from fluentllm.core.plugins import PluginManager
from fluentllm.core.protocols import BuildContext
from fluentllm.core.types import Drafting
from fluentllm.hub import load_config, resolve
from fluentllm.kernels import choose_ops
from fluentllm.step.decode import decode

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fluentllm.step.decode import Target

ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}


class TorchLaunches(TorchDispatchMode):
    """Counts what torch launches inside, by the operation's name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if name not in ALLOCATIONS and not func.is_view and any(tensor.numel() for tensor in tensors):
            self.found[name] += 1
        return out


def counted(
    model: str, method: str, drafts: Sequence[int], *, batch: int = 1, kv_dtype: str = "auto", precision: str = "bfloat16"
) -> Iterator[Counter[str]]:
    """Name → launches of a decode step of `batch` sequences, for each number of drafts that it verifies and leaves. `model`: a
    folder with a config."""
    overrides = {"speculative.method": method, "speculative.max_k": max(1, *drafts), "kv.dtype": kv_dtype}
    settings = config.load(None, overrides, {}).settings
    files, device = resolve(model, weights=False), torch.device("cuda", 0)
    plugins = PluginManager.load({"engine", "executor"}, allow=[])
    given = load_config(files)
    family = plugins.registry("models").get(given["architectures"][0]).factory
    positions = family.spec(given).max_position + 16
    context = BuildContext(device, torch.bfloat16, choose_ops(device, False), precision, positions)
    slots = torch.empty(batch, dtype=torch.int64, device="meta")
    by_torch: list[Counter[str]] = []

    def step(count: int, target: Target) -> None:
        with TorchLaunches() as launches:
            decode(slots, Drafting(count, count), 0, target)
        by_torch.append(launches.found)

    steps = [partial(step, count) for count in drafts]
    for ours in launches_of(settings, plugins, family, given, context, files.path, steps):
        yield by_torch[-1] + Counter(one.kernel.__name__ for one in ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--method", default="mtp")
    parser.add_argument("--drafts", type=lambda text: [int(n) for n in text.split(",")], default=[0, 1, 3])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--weight-precision", default="bfloat16")
    args = parser.parse_args()
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    with torch.inference_mode():
        given = {"batch": args.batch, "kv_dtype": args.kv_dtype, "precision": args.weight_precision}
        columns = {"none": next(counted(args.model, "none", [0], **given))}
        for drafts, found in zip(args.drafts, counted(args.model, args.method, args.drafts, **given), strict=True):
            columns[f"K = {drafts}"] = found
    rows = {name: [found[name] for found in columns.values()] for name in sorted(set().union(*columns.values()))}
    rows["in all"] = [found.total() for found in columns.values()]
    rows["more than without drafts"] = [total - rows["in all"][0] for total in rows["in all"]]
    print(f"{'launches':32}" + "".join(f"{name:>8}" for name in columns))
    for name, numbers in rows.items():
        print(f"{name:32}" + "".join(f"{number:>8}" for number in numbers))


if __name__ == "__main__":
    main()
