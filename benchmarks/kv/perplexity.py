"""Perplexity of held-out text over a KV cache in fewer bits, beside the same over BF16.

    python benchmarks/kv/perplexity.py --kv fp8,bfloat16 --passes decode:1,decode:8,prefill:32 --json FILE

Every token is predicted by the passes that serving makes, through the attention backend that it would take: `decode:n` computes
n rows a sequence, as steps with n - 1 drafts do, `prefill:n` chunks of n tokens behind a cached prefix. The text stands where
drafts would, so what is read back is the cache of the text itself. The files: what `examples/train_nano` held out.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fluentllm.assembly import load_model
from fluentllm.assembly.step import Parts, PartsMaker, Sizes
from fluentllm.bench import report
from fluentllm.core.config import load
from fluentllm.core.plugins import PluginManager
from fluentllm.core.protocols import DraftMemory
from fluentllm.core.types import PrefillChunk
from fluentllm.frontend.tokenizer import load_tokenizer
from fluentllm.hub import resolve
from fluentllm.step.decode import decode_batch
from fluentllm.step.prefill import prefill_batch

sys.path.insert(0, str(Path(__file__).parents[2]))
MODEL = "longcat-nano"
BASELINE = "bfloat16"
PROMPT = 16
"""Tokens computed before anything is predicted."""
MOST_ROWS = 8
SEQUENCES = 16
"""Side by side."""


def held_out(count: int, tokens: int) -> list[list[int]]:
    """The beginnings of so many files, behind an end-of-text token, each of as many tokens."""
    from examples.train_nano.data import sources

    tokenizer = load_tokenizer(resolve(MODEL).path)
    encoded = ([0, *tokenizer.encode(text)[: tokens - 1]] for text in sources()[1])
    return [found for found in encoded if len(found) == tokens][:count]


class Reader:
    """`MODEL` over a cache of one dtype."""

    def __init__(self, kv: str, tokens: int, device: str = "auto", dtype: str = "auto") -> None:
        settings = load(
            None, {"model.name": MODEL, "engine.device": device, "model.dtype": dtype, "kv.dtype": kv}, {}
        ).settings  # fmt: skip
        plugins = PluginManager.load({"engine", "executor"}, allow=[])
        self._model = load_model(settings, resolve(MODEL), plugins)
        sizes = Sizes(SEQUENCES, tokens, MOST_ROWS - 1, 0)
        maker = PartsMaker(settings, self._model, plugins, sizes, None, DraftMemory(), None)
        self._parts: Parts = maker.make(SEQUENCES * maker.tables(torch.device("meta")).max_pages)
        self.backend = type(self._parts.programs.attention).__name__

    @torch.inference_mode()
    def loss(self, texts: Tensor, kind: str, rows: int) -> Tensor:
        """texts [N, tokens] int64 → [N, predicted] negative log-likelihoods, float32, of the tokens behind `PROMPT`. What
        does not fill a last pass is left out."""
        return torch.cat([self._loss(part, kind, rows) for part in texts.split(SEQUENCES)])

    def _loss(self, texts: Tensor, kind: str, rows: int) -> Tensor:
        tables = self._parts.tables
        count, tokens = texts.shape
        texts = texts.to(tables.device)
        slots = torch.arange(count, device=tables.device)
        pages = torch.arange(count * tables.max_pages, dtype=torch.int32, device=tables.device) + 1
        tables.page_table[:count] = pages.view(count, -1)
        tables.history[:count, :tokens] = texts.to(torch.int32)
        tables.finished[:count] = False
        # The text goes on as if it had been drafted.
        tables.drafted[:count] = rows - 1
        self._prefill(count, 0, PROMPT)
        losses = []
        for start in range(PROMPT, tokens - rows, rows):
            if kind == "prefill":
                hidden = self._prefill(count, start, rows)
            else:
                tables.length[:count] = start + 1
                hidden = self._forward(decode_batch(slots, rows - 1, tables))
            wanted = texts[:, start + 1 : start + 1 + rows]
            logits = self._model.model.logits(hidden)
            losses.append(F.cross_entropy(logits, wanted.flatten(), reduction="none").view(count, rows).cpu())
        tables.finished[:count] = True
        return torch.cat(losses, 1)

    def _prefill(self, count: int, start: int, rows: int) -> Tensor:
        chunks = [PrefillChunk(slot=slot, start=start, count=rows, last=False) for slot in range(count)]
        return self._forward(prefill_batch(chunks, self._parts.tables))

    def _forward(self, batch: Any) -> Tensor:
        attention = self._parts.programs.attention
        attention.begin(batch)
        return self._model.model.forward(batch, attention)


def perplexities(kvs: Iterable[str], texts: Tensor, passes: Iterable[str], **where: str) -> Iterator[dict[str, Any]]:
    """A row for each pair."""
    for kv in kvs:
        reader = Reader(kv, texts.shape[1], **where)
        for name in passes:
            kind, rows = name.split(":")
            if kind not in ("decode", "prefill") or (kind == "decode" and int(rows) > MOST_ROWS):
                raise SystemExit(f"--passes takes decode:1 to decode:{MOST_ROWS} and prefill:N, not {name!r}.")
            started = time.perf_counter()
            loss = reader.loss(texts, kind, int(rows))
            yield {
                "kv": kv,
                "backend": reader.backend,
                "passes": name,
                "tokens": loss.numel(),
                "perplexity": math.exp(loss.double().mean().item()),
                "seconds": time.perf_counter() - started,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv", default="fp8", help="kv.dtype, with commas; bfloat16 is always measured")
    parser.add_argument("--passes", default="decode:1,decode:8,prefill:32")
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512, help="of each text")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="of the activations")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    texts = torch.tensor(held_out(args.texts, args.tokens))
    kvs = [BASELINE, *(kv for kv in args.kv.split(",") if kv != BASELINE)]
    base: dict[str, float] = {}
    rows = []
    print(f"{'kv':10} {'backend':20} {'passes':11} {'tokens':>7} {'perplexity':>11} {'against ' + BASELINE:>17}")
    for row in perplexities(kvs, texts, args.passes.split(","), device=args.device, dtype=args.dtype):
        row["against"] = row["perplexity"] / base.setdefault(row["passes"], row["perplexity"]) - 1
        rows.append(row)
        print(
            f"{row['kv']:10} {row['backend']:20} {row['passes']:11} {row['tokens']:7} {row['perplexity']:11.4f} "
            f"{row['against']:17.3%}",
            flush=True,
        )
    report.write(args.json, {"rows": rows, **report.environment(), "command": " ".join(["python", *sys.argv])})


if __name__ == "__main__":
    main()
