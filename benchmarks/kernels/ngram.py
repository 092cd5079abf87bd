"""N-gram embedding (LongCat-Flash-Lite's shape): two launches, tables on the device and in pinned host memory, beside plain
torch.

    python benchmarks/kernels/ngram.py --tokens 1,8,32,128 --json FILE

Rows {tables, tokens, us, gather_us, torch_us, MB_per_s, error}: `us` of gather and projection, `torch_us` of hashing, gather,
product and mean in torch (tables on the device). The tables are smaller than the model's (`--ratio`), the rows read as
scattered.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from sweep import DEVICE, error_of, line, rotate

from fluentllm.kernels.ngram import NgramHash, ngram_ids
from fluentllm.kernels.triton.linear import new_counters
from fluentllm.kernels.triton.ngram import ngram_embedding, ngram_gather

if TYPE_CHECKING:
    from torch import Tensor

VOCAB, HIDDEN, LENGTH, SLOTS = 131072, 3072, 4096, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 32, 128])
    parser.add_argument("--ratio", type=float, default=2.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(DEVICE)
    hash_ = NgramHash(vocab=VOCAB, ratio=options.ratio, neighbors=4, splits=4, stops=(2,))
    sizes = [hash_.rows(i) for i in range(hash_.tables)]
    starts = torch.tensor([sum(sizes[:i]) for i in range(hash_.tables)], device=device)
    words = torch.randn(VOCAB, HIDDEN, device=device).bfloat16()
    on_device = torch.randn(sum(sizes), HIDDEN // hash_.tables, device=device).bfloat16()
    places = {"device": on_device, "pinned": on_device.cpu().pin_memory()}
    projection = torch.randn(HIDDEN, HIDDEN, device=device).bfloat16() * HIDDEN**-0.5
    history = torch.randint(0, VOCAB, (SLOTS, LENGTH), dtype=torch.int32, device=device)
    constants = [t.to(device) for t in (torch.tensor(hash_.stops), hash_.factors(), hash_.moduli())]
    counters = new_counters(HIDDEN, device)
    widths = (8, 7, 8, 10, 9, 9, 8)
    print(line(("tables", "tokens", "us", "gather us", "torch us", "MB/s", "error"), widths))
    rows = []
    for tokens in options.tokens:
        # Other tokens in every copy, so that their rows are in no cache.
        inputs = [(torch.randint(0, VOCAB, (tokens,), device=device), torch.randint(0, LENGTH, (tokens,), device=device),
                   torch.randint(0, SLOTS, (tokens,), device=device), history, *constants) for _ in range(16)]  # fmt: skip

        def plain(given: tuple[Tensor, ...]) -> Tensor:
            found = F.embedding(ngram_ids(*given) + starts, on_device).flatten(1)
            return (F.embedding(given[0], words) + F.linear(found, projection)) / (1 + hash_.tables)

        torch_us = rotate([lambda given=given: plain(given) for given in inputs])
        for place, tables in places.items():

            def ours(given: tuple[Tensor, ...], tables: Tensor = tables) -> Tensor:
                found, word_rows = ngram_gather(*given, starts, tables, words)
                return ngram_embedding(found, word_rows, projection, hash_.tables, counters=counters)

            us = rotate([lambda given=given: ours(given) for given in inputs])
            gather = rotate(
                [lambda given=given, tables=tables: ngram_gather(*given, starts, tables, words) for given in inputs]
            )
            error = error_of(ours(inputs[0]), plain(inputs[0]).float())
            rate = tokens * HIDDEN * 2 / gather
            rows.append({"tables": place, "tokens": tokens, "us": us, "gather_us": gather, "torch_us": torch_us,
                         "MB_per_s": rate, "error": error})  # fmt: skip
            print(line((place, tokens, us, gather, torch_us, rate, f"{error:.1e}"), widths), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
