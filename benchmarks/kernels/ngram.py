"""N-gram embedding (LongCat-Flash-Lite's shape unless told another): two launches, tables on the device and in pinned host
memory, beside plain torch.

    python benchmarks/kernels/ngram.py --tokens 1,8,32,128 --json FILE
    python benchmarks/kernels/ngram.py --shape vocab=32000,hidden=2048,ratio=4,neighbors=3,splits=4

Rows {shape, tables, tokens, us, gather_us, torch_us, MB_per_s, share, error}: `us` of gather and projection, `torch_us` of
hashing, gather, product and mean in torch (tables on the device). `share` of the roofline (`rates.py`), counting the rows of
tables and words, the projection and the result once; rows of pinned tables at the rate of a copy from there. The tables are
smaller than the model's (`ratio`), the rows read as scattered; projections rotate as weights do (`sweep.py`), 16 at most, so
that small ones stay in L2.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
import triton
from rates import Rates, bus_rate, here, write_rows
from shapes import add_shape, numbers
from sweep import DEVICE, copies_for, error_of, line, rotate

from fluentllm.kernels.ngram import NgramHash, ngram_ids
from fluentllm.kernels.triton.linear import new_counters
from fluentllm.kernels.triton.ngram import ngram_embedding, ngram_gather

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

LENGTH, SLOTS, INPUTS = 4096, 256, 16


@dataclass(frozen=True)
class Embedding:
    """As `--shape` has it."""

    vocab: int = 131072
    hidden: int = 3072
    ratio: float = 2.0
    """Of a table's rows to the vocabulary."""
    neighbors: int = 4
    splits: int = 4
    name: str = ""

    def __post_init__(self) -> None:
        if self.neighbors < 2:
            raise ValueError("neighbors counts the token itself, so it is at least 2")
        if self.hidden % self.tables or self.hidden % 16:
            raise ValueError(f"hidden must be a multiple of 16 and of the {self.tables} tables, not {self.hidden}")

    @property
    def hash(self) -> NgramHash:
        return NgramHash(self.vocab, self.ratio, self.neighbors, self.splits, stops=(2,))

    @property
    def tables(self) -> int:
        return (self.neighbors - 1) * self.splits

    @property
    def label(self) -> str:
        return self.name or f"{self.vocab}x{self.hidden}/{self.tables}"

    def floor_us(self, tokens: int, rates: Rates, bus: float | None) -> float:
        """Least microseconds; bus: GB/s of the tables' memory, where that is the host's."""
        row = 2 * self.hidden  # as many bytes as all tables give a token, and as a word's row has
        moved = row * self.hidden + 2 * tokens * row + (tokens * row if bus is None else 0)
        device = rates.floor_us(moved, bf16=2.0 * tokens * self.hidden**2)
        return device if bus is None else max(device, tokens * row / (bus * 1e3))


WIDTHS = (20, 7, 6, 7, 9, 8, 9, 6, 8)


def measure(shape: Embedding, counts: list[int], bus: float | None) -> list[dict[str, object]]:
    device = torch.device(DEVICE)
    hash_ = shape.hash
    sizes = [hash_.rows(i) for i in range(hash_.tables)]
    starts = torch.tensor([sum(sizes[:i]) for i in range(hash_.tables)], device=device)
    words = torch.randn(shape.vocab, shape.hidden, dtype=torch.bfloat16, device=device)
    on_device = torch.randn(sum(sizes), shape.hidden // hash_.tables, dtype=torch.bfloat16, device=device)
    places = {"device": on_device, "pinned": on_device.cpu().pin_memory()}
    projections = [torch.randn(shape.hidden, shape.hidden, device=device).bfloat16() * shape.hidden**-0.5
                   for _ in range(min(INPUTS, copies_for(2 * shape.hidden**2)))]  # fmt: skip
    history = torch.randint(0, shape.vocab, (SLOTS, LENGTH), dtype=torch.int32, device=device)
    constants = [t.to(device) for t in (torch.tensor(hash_.stops), hash_.factors(), hash_.moduli())]
    counters = new_counters(shape.hidden, device)
    rows: list[dict[str, object]] = []
    for tokens in counts:
        # Other tokens in every copy, so that their rows are in no cache.
        inputs = [(torch.randint(0, shape.vocab, (tokens,), device=device), torch.randint(0, LENGTH, (tokens,), device=device),
                   torch.randint(0, SLOTS, (tokens,), device=device), history, *constants) for _ in range(INPUTS)]  # fmt: skip

        def plain(i: int, given: list[tuple[Tensor, ...]] = inputs) -> Tensor:
            found = F.embedding(ngram_ids(*given[i]) + starts, on_device).flatten(1)
            projected = F.linear(found, projections[i % len(projections)])
            return (F.embedding(given[i][0], words) + projected) / (1 + hash_.tables)

        torch_us = rotate([partial(plain, i) for i in range(INPUTS)])
        for place, tables in places.items():

            def gather(i: int, tables: Tensor = tables, given: list[tuple[Tensor, ...]] = inputs) -> tuple[Tensor, Tensor]:
                return ngram_gather(*given[i], starts, tables, words)

            def ours(i: int, gather: Callable[[int], tuple[Tensor, Tensor]] = gather) -> Tensor:
                return ngram_embedding(*gather(i), projections[i % len(projections)], hash_.tables, counters=counters)

            us, gather_us = (rotate([partial(run, i) for i in range(INPUTS)]) for run in (ours, gather))
            error, rate = error_of(ours(0), plain(0).float()), tokens * shape.hidden * 2 / gather_us
            # Without the rate of the bus there is no roofline of what comes over it.
            known = place == "device" or bus is not None
            floor = shape.floor_us(tokens, here(), None if place == "device" else bus) if known else None
            share = None if floor is None else floor / us
            rows.append(asdict(shape) | {"shape": shape.label, "tables": place, "tokens": tokens, "us": us,
                        "gather_us": gather_us, "torch_us": torch_us, "MB_per_s": rate, "share": share, "bus_GBps": bus,
                        "error": error})  # fmt: skip
            shown = (shape.label, place, tokens, us, gather_us, torch_us, rate, share and f"{share:.2f}", f"{error:.1e}")
            print(line(shown, WIDTHS), flush=True)
    return rows


def host_rate() -> float | None:
    try:
        rate = bus_rate()
    except Exception as error:  # no room to pin
        print(f"  rate of pinned memory: {type(error).__name__}: {str(error)[:160]}", flush=True)
        return None
    print(f"pinned memory is read at {rate:,.0f} GB/s at most", flush=True)
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape(parser, Embedding, "embeddings")
    parser.add_argument("--tokens", type=numbers, default=[1, 8, 32, 128])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    here()
    bus = host_rate()
    print(line(("shape", "tables", "tokens", "us", "gather us", "torch us", "MB/s", "share", "error"), WIDTHS))
    rows: list[dict[str, object]] = []
    for shape in options.shape or [Embedding()]:
        rows += measure(shape, options.tokens, bus)
        torch.cuda.empty_cache()
    write_rows(options.json, rows, here())


if __name__ == "__main__":
    main()
