"""Train the EAGLE-3 draft head of SmolLM2-135M-Instruct on the model's own answers.

    python -m examples.train_eagle --model FILE.gguf --out FOLDER

run in the repository's root, on one GPU, takes about five minutes: it makes prompts (`prompts.py`), lets the model answer
them, half greedily and half at a temperature, trains the head on these answers, and writes FOLDER/smollm2-eagle3 in the
public layout of EAGLE-3. `--start FOLDER` goes on with such a head, on answers to other prompts if `--seed` differs. It needs
torch, tokenizers, safetensors, gguf, and this project's package. `--model` is a GGUF file or a model's short name. `--tiny` is
a quick run of the whole on a CPU, for tests.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fluentllm.frontend.templates import ChatTemplate
from fluentllm.frontend.tokenizer import Tokenizer, load_tokenizer
from fluentllm.hub import resolve

from ..drafting import Budget, mean_accepted_length
from .head import Head, Shape, load, save
from .prompts import prompts
from .target import Target

DEPTHS = 4
REPORTED = 3
Answer = tuple[list[int], int]
"""Tokens of the prompt and of the answer, and how many are the prompt's."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a .gguf file of the Llama layout, or a short name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="folder of a head to go on with")
    parser.add_argument("--minutes", type=float, default=5.0, help="for everything")
    parser.add_argument("--steps", type=int, help="train for so many steps, whatever time they take")
    parser.add_argument("--answers", type=int, default=24000, help="most answers to train on")
    parser.add_argument("--new", type=int, default=256, help="most tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.6, help="of every second answer; the others are greedy")
    parser.add_argument("--generate-batch", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64, help="sequences of a training step")
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--draft-vocab", type=int, default=8192)
    parser.add_argument("--shard-mb", type=float, default=12.0, help="largest file of weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="few answers, few steps, a small vocabulary")
    args = parser.parse_args()
    if args.tiny:
        args.answers, args.new, args.generate_batch, args.batch, args.draft_vocab = 24, 24, 12, 4, 512
        args.steps = args.steps or 8
    return args


def main() -> None:
    args = options()
    started = time.monotonic()
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    path = resolve(args.model).path
    tokenizer = load_tokenizer(path)
    target = Target(path, device, dtype)
    ends = tokenizer.eos_ids
    asked = prompts(args.answers, args.seed, held=False)
    print(f"{len(asked)} prompts; {time.monotonic() - started:.0f} s", flush=True)

    until = started + args.minutes * 60 * 0.3
    answers = ask(target, encode(tokenizer, asked), ends, args.new, args.generate_batch, args.temperature, until)
    count = sum(len(tokens) - start for tokens, start in answers)
    print(f"{len(answers)} answers, {count / 1e6:.2f} M tokens; {time.monotonic() - started:.0f} s", flush=True)

    shape = shape_of(target, args.draft_vocab)
    head = load(shape, args.start).to(device) if args.start else beginning(shape, target, answers)
    covered = sum(int(head.t2d.cpu()[torch.tensor(tokens[start:])].sum()) for tokens, start in answers) / count
    print(f"the {args.draft_vocab} tokens kept are {covered:.1%} of the answers", flush=True)
    left = args.minutes * 60 - (time.monotonic() - started)
    fit(head, target, answers, Budget((left * 0.88 - 10) / 60, args.steps), args.batch, args.rate, args.seed)

    folder = args.out / "smollm2-eagle3"
    stored = save(head, target, folder, int(args.shard_mb * 1e6))
    print(f"{sum(p.numel() for p in head.parameters()) / 1e6:.2f} M parameters, {stored / 1e6:.2f} MB in {folder}")
    held = Target(path, device, torch.float32)
    loaded = load(shape, folder).to(device)
    written = (Path(__file__).parent / "heldout.txt").read_text().splitlines()
    if args.tiny:
        written = written[:4]
    measure("prompts held out, of the same forms", loaded, held, tokenizer, prompts(len(written) * 2, 1, held=True), args.new)
    measure("prompts of heldout.txt", loaded, held, tokenizer, written, args.new)
    print(f"all: {time.monotonic() - started:.0f} s")


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """As the server does for a chat of one message."""
    assert tokenizer.chat_template is not None
    template = ChatTemplate(tokenizer.chat_template, tokenizer.special.names)
    rendered = [template.render([{"role": "user", "content": text}]) for text in texts]
    return [tokenizer.encode(text, add_special_tokens=False) for text in rendered]


def ask(
    target: Target, asked: list[list[int]], ends: tuple[int, ...], new: int, batch: int, temperature: float, until: float
) -> list[Answer]:
    """Batches of prompts of similar length, in random order, until the time is over."""
    order = sorted(range(len(asked)), key=lambda i: len(asked[i]))
    batches = [order[i : i + batch] for i in range(0, len(order), batch)]
    found: list[Answer] = []
    for number in torch.randperm(len(batches)).tolist():
        if found and time.monotonic() > until:
            break
        some = [asked[i] for i in batches[number]]
        temperatures = torch.tensor([temperature * (i % 2) for i in batches[number]], device=target.device)
        told = target.answer(some, new, temperatures, ends)
        found += [(prompt + answer, len(prompt)) for prompt, answer in zip(some, told, strict=True)]
    return found


def beginning(shape: Shape, target: Target, answers: list[Answer]) -> Head:
    """An untrained head for the tokens that the answers use most."""
    head = Head(shape, frequent(answers, shape.vocab, shape.draft_vocab, target.device)).to(target.device)
    head.begin_from(target)
    return head


def frequent(answers: list[Answer], vocab: int, count: int, device: torch.device) -> Tensor:
    """The ids of the most frequent tokens, rising; [count] int64."""
    seen = torch.zeros(vocab, dtype=torch.int64)
    for tokens, start in answers:
        seen += torch.bincount(torch.tensor(tokens[start:]), minlength=vocab) * 16
        seen += torch.bincount(torch.tensor(tokens), minlength=vocab)
    return seen.argsort(descending=True, stable=True)[:count].sort().values.to(device)


def shape_of(target: Target, draft_vocab: int) -> Shape:
    return Shape(
        vocab=target.embedding.shape[0],
        draft_vocab=draft_vocab,
        hidden=target.embedding.shape[1],
        inner=int(target.config["intermediate_size"]),
        heads=target.heads,
        kv_heads=target.kv_heads,
        size=target.size,
        theta=target.theta,
        eps=target.eps,
        max_position=int(target.config["max_position_embeddings"]),
    )


def batches(answers: list[Answer], size: int, seed: int) -> list[list[Answer]]:
    """One epoch: in random order, but sequences of similar length together."""
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(answers), generator=random).tolist()
    found = []
    for i in range(0, len(order), size * 16):
        some = sorted((answers[j] for j in order[i : i + size * 16]), key=lambda answer: len(answer[0]))
        found += [some[j : j + size] for j in range(0, len(some), size)]
    return [found[i] for i in torch.randperm(len(found), generator=random).tolist()]


def padded(some: list[Answer], device: torch.device) -> tuple[Tensor, Tensor]:
    """tokens [B, T] int64, and wanted [B, T] bool: rows whose next token is of the answer."""
    length = max(len(tokens) for tokens, _ in some)
    tokens = torch.zeros(len(some), length, dtype=torch.int64)
    wanted = torch.zeros(len(some), length, dtype=torch.bool)
    for row, (ids, start) in enumerate(some):
        tokens[row, : len(ids)] = torch.tensor(ids)
        wanted[row, start : len(ids) - 1] = True
    return tokens.to(device), wanted.to(device)


def fit(head: Head, target: Target, answers: list[Answer], budget: Budget, batch: int, rate: float, seed: int) -> None:
    device = target.device
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.05, fused=device.type == "cuda")
    began = time.monotonic()
    epoch = 0
    while budget.done < 1:
        for some in batches(answers, batch, seed + epoch):
            for group in optimizer.param_groups:
                group["lr"] = rate * budget.rate()
            tokens, wanted = padded(some, device)
            states, final = target.states(tokens)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                by_depth = losses(head, target, tokens, wanted, states, final, first_row=budget.step % 2 == 0)
            loss = sum(0.8**depth * one for depth, one in enumerate(by_depth))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            budget.step += 1
            if budget.step in (1, 10, 100) or budget.step % 250 == 0:
                shown = " ".join(f"{one.item():.3f}" for one in by_depth)
                print(
                    f"step {budget.step:5} epoch {epoch} {budget.done:4.0%} {time.monotonic() - began:4.0f} s "
                    f"loss by depth {shown}",
                    flush=True,
                )
            if budget.done >= 1:
                break
        epoch += 1


def losses(
    head: Head, target: Target, tokens: Tensor, wanted: Tensor, states: Tensor, final: Tensor, *, first_row: bool
) -> list[Tensor]:
    """By depth: cross entropy with the target's own distribution over the head's vocabulary, where the next token is in it."""
    known = wanted & F.pad(head.t2d[tokens][:, 1:], (0, 1))
    own = (final[known] @ target.head[head.kept].T).float().softmax(-1)
    found = []
    words = F.embedding(tokens, target.embedding)
    for depth, state in enumerate(head(words, states, DEPTHS, first_row=first_row)):
        drafted = head.lm_head(state[known]).float().log_softmax(-1)
        # A chain starts with a row of the answer or the prompt's last, which all rows here have `depth` rows before.
        found.append(-(own * drafted).sum(-1).mean() if drafted.numel() else state.sum() * 0.0 + depth * 0.0)
    return found


@torch.no_grad()
def measure(what: str, head: Head, target: Target, tokenizer: Tokenizer, texts: list[str], new: int) -> None:
    """Print how long drafts for greedy answers are accepted, in float32."""
    asked = encode(tokenizer, texts)
    told = target.answer(asked, new, torch.zeros(len(asked), device=target.device), tokenizer.eos_ids)
    answers = [(prompt + answer, len(prompt)) for prompt, answer in zip(asked, told, strict=True)]
    tokens, wanted = padded(answers, target.device)
    states, final = target.states(tokens)
    own = torch.stack([(row @ target.head.T).argmax(-1) for row in final])
    words = F.embedding(tokens, target.embedding)
    following = F.pad(tokens[:, 1:], (0, 1))
    shown = []
    for first_row in (True, False):
        matches = []
        for state in head(words, states, REPORTED, first_row=first_row):
            drafted = torch.stack([head.kept[head.lm_head(row).argmax(-1)] for row in state])
            matches.append(drafted == following)
        matched = torch.stack(matches, 1)
        agree = " ".join(f"{(one & wanted).sum().item() / wanted.sum().item():.3f}" for one in matches)
        starts, ends = [start for _, start in answers], [len(ids) for ids, _ in answers]
        length = mean_accepted_length(matched, starts, ends)
        shown.append(f"{length:.3f} ({agree} by depth{'' if first_row else ', without a row for the first token'})")
    same = ((own == following) & wanted).sum().item() / wanted.sum().item()
    print(f"{what}: mean accepted length at K = {REPORTED}, greedy: {'; '.join(shown)}")
    print(f"{what}: {len(texts)} prompts, {int(wanted.sum())} tokens, of which {same:.2%} are the target's choice again")
    print(f"  {texts[0]!r} → {tokenizer.decode(told[0])[:300]!r}", flush=True)


if __name__ == "__main__":
    main()
