"""Train `longcat-nano` and `longcat-nano-ngram`: real LongCat-Flash models of a few million parameters.

    python -m examples.train_nano --out FOLDER

run in the repository's root, on one GPU, takes about four minutes and writes FOLDER/longcat-nano and
FOLDER/longcat-nano-ngram, each in the layout that `fluent serve` and Transformers read. It needs torch, tokenizers and
safetensors. The text is the standard library of the Python that runs it; the same Python and GPU give much the same model
again, not the same bits (the budget is minutes). `--tiny` is a quick run of the whole on a CPU, for tests.

The MTP layer is trained jointly: at depths 1 … 3 it learns the model's own distribution for the token that it drafts.
`--start FOLDER` trains only the MTP layers of models that are there further (`drafts.py`), which takes a minute or two each.
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
import sysconfig
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from ..drafting import Budget, mean_accepted_length
from .checkpoint import load, save
from .data import Crops, encode, sources, train_tokenizer
from .drafts import continuations, fit_drafts
from .model import Longcat, Shape

DEPTHS = 3
NANO = Shape()
NGRAM = replace(NANO, dense=128, ngram_ratio=0.25)
TINY = {"hidden": 64, "layers": 1, "heads": 2, "kv_lora": 32, "nope": 16, "rope": 8, "value": 16, "dense": 64, "vocab": 512}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the two models")
    parser.add_argument("--minutes", type=float, default=4.0, help="for both models together")
    parser.add_argument("--steps", type=int, help="train for so many steps, whatever time they take")
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="folder of finished models, whose MTP layer alone is trained further")
    parser.add_argument("--sequences", type=int, default=20000, help="with --start: most sequences to train on")
    parser.add_argument("--only", choices=("longcat-nano", "longcat-nano-ngram"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a very small model on little text")
    args = parser.parse_args()
    if args.tiny:
        args.batch, args.length = 4, 128
    return args


def main() -> None:
    args = options()
    started = time.monotonic()
    device = torch.device(args.device)
    train_texts, held_texts = sources(40 if args.tiny else None)
    if not train_texts or not held_texts:
        sys.exit(f"no sources of the standard library in {sysconfig.get_path('stdlib')}: use a Python that has them")
    size = sum(map(len, train_texts))
    shapes = {"longcat-nano": NANO, "longcat-nano-ngram": NGRAM}
    if args.tiny:
        shapes = {name: replace(shape, **TINY) for name, shape in shapes.items()}
    if args.only:
        shapes = {args.only: shapes[args.only]}
    vocab = next(iter(shapes.values())).vocab
    if args.start:
        tokenizer = Tokenizer.from_file(str(args.start / next(iter(shapes)) / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(train_texts, vocab)
    train, held = encode(tokenizer, train_texts), encode(tokenizer, held_texts)
    bytes_a_token = sum(len(text.encode()) for text in held_texts) / sum(map(len, held))
    print(
        f"Python {platform.python_version()}'s library: {len(train)} files, {size / 1e6:.1f} M characters, "
        f"{sum(map(len, train)) / 1e6:.2f} M tokens; held out: {len(held)} files, {sum(map(len, held)) / 1e6:.2f} M tokens, "
        f"{bytes_a_token:.2f} bytes a token; {time.monotonic() - started:.0f} s",
        flush=True,
    )
    left = args.minutes - (time.monotonic() - started) / 60
    for name, shape in shapes.items():
        # A sixth of the time is for measuring afterwards.
        minutes = max(0.05, left / len(shapes) * 5 / 6)
        torch.manual_seed(args.seed)
        crops = Crops(train, shape.eos, device, args.seed)
        if args.start:
            model = load(shape, args.start / name).to(device)
            before = accepted_length(model, held, 4 if args.tiny else 64)
            print(f"{name}: mean accepted length at K = {DEPTHS}, greedy, before: {before:.2f}", flush=True)
            further(model, crops, minutes, args)
        else:
            model = Longcat(shape).to(device)
            fit(model, crops, Budget(minutes, args.steps), args.batch, args.length, args.rate)
        stored = save(model, tokenizer, args.out / name)
        loaded = load(shape, args.out / name).to(device)
        print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {stored / 1e6:.2f} MB")
        report(name, loaded, held, args.length, bytes_a_token)
        length = accepted_length(loaded, held, 4 if args.tiny else 64)
        print(f"{name}: mean accepted length at K = {DEPTHS}, greedy: {length:.2f}", flush=True)
        show(loaded, tokenizer)
    print(f"all: {time.monotonic() - started:.0f} s")


def further(model: Longcat, crops: Crops, minutes: float, args: argparse.Namespace) -> None:
    """The MTP layer alone: a third of the time for the model's continuations, in sequences as they are measured."""
    began = time.monotonic()
    length, batch = (32, 4) if args.tiny else (192, 256)
    sequences = continuations(model, crops, batch, length, began + minutes * 20, args.sequences)
    print(f"{len(sequences)} sequences of {length} tokens; {time.monotonic() - began:.0f} s", flush=True)
    budget = Budget(minutes - (time.monotonic() - began) / 60, args.steps)
    fit_drafts(model, sequences, budget, args.batch, args.rate, DEPTHS, args.seed)


def fit(model: Longcat, crops: Crops, budget: Budget, batch: int, length: int, rate: float) -> None:
    device = crops.tokens.device
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=rate,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    drops = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    began = time.monotonic()
    while budget.done < 1:
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = rate * budget.rate()
        if budget.done > 0.85:
            for drop in drops:
                drop.p = 0.0
        tokens = crops(batch, length)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, drafting = losses(model, tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        (loss + 0.5 * drafting).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for router in model.routers():
            router.balance(2e-3 * budget.rate())
        budget.step += 1
        if budget.step in (1, 10, 100) or budget.step % 250 == 0:
            seconds = time.monotonic() - began
            speed = budget.step * batch * length / seconds
            print(
                f"step {budget.step:5} {budget.done:4.0%} {seconds:4.0f} s loss {loss.item():.3f} drafts {drafting.item():.3f} "
                f"{speed / 1e3:.0f} k tokens/s",
                flush=True,
            )


def losses(model: Longcat, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of the next token, and of the drafts for it: how far their distributions are from the model's own (which learns
    nothing from that comparison), averaged over depths."""
    hidden = model(tokens)
    logits = model.logits(hidden).float().flatten(0, 1)
    loss = F.cross_entropy(logits, targets.flatten())
    wanted = logits.detach().log_softmax(-1)
    drafting = loss.new_zeros(())
    for depth, state in enumerate(model.drafts(tokens, hidden, DEPTHS)):
        drafted = model.logits(state).float().log_softmax(-1).flatten(0, 1)
        apart = F.kl_div(drafted, wanted, log_target=True, reduction="none").sum(-1).view(tokens.shape)
        drafting = drafting + apart[:, depth:].mean() / DEPTHS
    return loss, drafting


@torch.no_grad()
def report(name: str, model: Longcat, held: list[list[int]], length: int, bytes_a_token: float) -> None:
    """Print what the stored model, read back in float32, is worth on the files held out."""
    device = next(model.parameters()).device
    tokens = [token for document in held for token in [*document, model.s.eos]]
    count = min(64, (len(tokens) - 1) // length)
    block = torch.tensor(tokens[: count * length + 1], device=device)
    total, agree, seen = 0.0, [0] * DEPTHS, 0
    model.train()  # for the routers' loads
    for drop in model.modules():
        if isinstance(drop, torch.nn.Dropout):
            drop.p = 0.0
    loads = [torch.zeros_like(router.load) for router in model.routers()]
    for i in range(0, count, 8):
        rows = torch.stack([block[j * length : (j + 1) * length + 1] for j in range(i, min(i + 8, count))])
        hidden = model(rows[:, :-1])
        logits = model.logits(hidden)
        total += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
        own = logits.argmax(-1)
        for depth, state in enumerate(model.drafts(rows[:, :-1], hidden, DEPTHS)):
            agree[depth] += int((model.logits(state).argmax(-1) == own)[:, DEPTHS:].sum())
        seen += own[:, DEPTHS:].numel()
        loads = [load + router.load / math.ceil(count / 8) for load, router in zip(loads, model.routers(), strict=True)]
    model.eval()
    loss = total / (count * length)
    print(f"{name}: held out: perplexity {math.exp(loss):.2f}, {loss / math.log(2) / bytes_a_token:.3f} bits a byte")
    print(f"{name}: drafts that are the model's own choice, by depth: {' '.join(f'{n / seen:.3f}' for n in agree)}")
    for number, load_ in enumerate(loads):
        print(f"{name}: layer {number}: share of choices by expert: {' '.join(f'{share:.3f}' for share in load_.tolist())}")


@torch.no_grad()
def accepted_length(model: Longcat, held: list[list[int]], prompts: int, prompt: int = 96, new: int = 96) -> float:
    """Of greedy continuations of the files held out."""
    device = next(model.parameters()).device
    starts = [document[at : at + prompt] for document in held for at in range(0, len(document) - prompt, 2000)][:prompts]
    tokens = torch.tensor(starts, device=device)
    for _ in range(new):
        tokens = torch.cat((tokens, model.logits(model(tokens)[:, -1:]).argmax(-1)), 1)
    drafted = model.drafts(tokens, model(tokens), DEPTHS)
    matches = torch.stack([model.logits(state).argmax(-1)[:, :-1] == tokens[:, 1:] for state in drafted], 1)
    ends = []
    for row in tokens[:, prompt:].tolist():
        ends.append(prompt + (row.index(model.s.eos) + 1 if model.s.eos in row else len(row)))
    return mean_accepted_length(matches, [prompt] * len(starts), ends)


@torch.no_grad()
def show(model: Longcat, tokenizer: Tokenizer) -> None:
    """Print a continuation."""
    tokens = torch.tensor([tokenizer.encode("def read_lines(path):\n").ids], device=next(model.parameters()).device)
    for _ in range(64):
        tokens = torch.cat((tokens, model.logits(model(tokens)[:, -1:]).argmax(-1)), 1)
    print(tokenizer.decode(tokens[0].tolist()), flush=True)


if __name__ == "__main__":
    main()
