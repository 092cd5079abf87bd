"""Train the EAGLE-3 draft head of SmolLM2-135M-Instruct on the model's own answers.

    python -m examples.train_eagle --model FILE.gguf --out FOLDER

run in the repository's root, on one GPU, takes six minutes: the model writes questions itself, the first part of a chat being
all that it is given; it answers these and made prompts (`prompts.py`), most greedily, the others at a temperature; and the
head is trained on the answers. `--start FOLDER` goes on with such a head, on answers to other prompts if `--seed` differs. It
needs torch (2.9 or newer), tokenizers, safetensors, gguf, and this project's package. `--model` is a GGUF file or a model's
short name. `--tiny` is a quick run of the whole on a CPU, for tests.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fluentllm.frontend.templates import ChatTemplate
from fluentllm.frontend.tokenizer import Tokenizer, load_tokenizer
from fluentllm.hub import resolve

from ..drafting import Budget, mean_accepted_length
from .answers import Writer, answers_to
from .fitting import Answer, batch_of, fit
from .head import Head, Shape, load, save
from .prompts import held_out, prompts, resembles_held_out, written
from .target import Target

REPORTED = 3
LONGEST = 160
"""Tokens of a prompt, at most."""
QUESTION = 64
"""Tokens of a question that the model asks, at most."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a .gguf file of the Llama layout, or a short name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="folder of a head to go on with")
    parser.add_argument("--minutes", type=float, default=5.7, help="for everything")
    parser.add_argument("--question-minutes", type=float, default=0.25, help="of these, for the model's own questions")
    parser.add_argument("--answer-minutes", type=float, default=1.1, help="of these, for answers")
    parser.add_argument("--measure-minutes", type=float, default=0.5, help="of these, for measuring afterwards")
    parser.add_argument("--steps", type=int, help="train for so many steps, whatever time they take")
    parser.add_argument("--prompts", type=int, default=40000, help="most made prompts")
    parser.add_argument("--questions", type=int, default=40000, help="most questions of the model's own")
    parser.add_argument("--new", type=int, default=256, help="most tokens of an answer")
    parser.add_argument("--sampled", type=float, default=0.3, help="share of answers at a temperature; the others are greedy")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--generate-batch", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=24576, help="of a training step")
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--draft-vocab", type=int, default=8192)
    parser.add_argument("--inner", type=int, default=2304, help="inner size of the head's MLP")
    parser.add_argument("--shard-mb", type=float, default=14.0, help="largest file of weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="few answers, few steps, a small vocabulary")
    args = parser.parse_args()
    if args.tiny:
        args.prompts, args.questions, args.new, args.generate_batch, args.tokens = 24, 12, 24, 12, 512
        args.draft_vocab, args.inner = 512, 64
        args.steps = args.steps or 8
    return args


def main() -> None:
    args = options()
    started = time.monotonic()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    path = resolve(args.model).path
    tokenizer = load_tokenizer(path)
    target = Target(path, device, dtype)
    print(f"{path.name} on {device}; {time.monotonic() - started:.0f} s", flush=True)

    until = time.monotonic() + args.question_minutes * 60
    asked = questions(target, tokenizer, args.questions, args.generate_batch, until)
    print(f"{len(asked)} questions of its own, such as {asked[:3]}; {time.monotonic() - started:.0f} s", flush=True)
    asked += prompts(args.prompts, args.seed, held=False)
    encoded = [tokens for tokens in encode(tokenizer, asked) if len(tokens) <= LONGEST]
    print(f"{len(encoded)} prompts; {time.monotonic() - started:.0f} s", flush=True)
    until = time.monotonic() + args.answer_minutes * 60
    answers = ask(target, encoded, tokenizer.eos_ids, args, until)
    count = sum(len(tokens) - start for tokens, start in answers)
    print(f"{len(answers)} answers, {count / 1e6:.2f} M tokens; {time.monotonic() - started:.0f} s", flush=True)

    head = (
        load(args.start).to(device)
        if args.start
        else beginning(shape_of(target, args.draft_vocab, args.inner), target, answers)
    )
    known = head.t2d.cpu()
    covered = sum(int(known[torch.tensor(tokens[start:])].sum()) for tokens, start in answers) / count
    print(f"the {head.s.draft_vocab} tokens kept are {covered:.1%} of the answers", flush=True)
    left = args.minutes - args.measure_minutes - (time.monotonic() - started) / 60
    fit(head, target, answers, Budget(max(left, 0.1), args.steps), args.tokens, args.rate, args.seed)

    folder = args.out / "smollm2-eagle3"
    stored = save(head, target, folder, int(args.shard_mb * 1e6))
    size = sum(p.numel() for p in head.parameters()) / 1e6
    print(f"{size:.2f} M parameters, {stored / 1e6:.2f} MB in {folder}; {time.monotonic() - started:.0f} s", flush=True)
    torch.set_float32_matmul_precision("highest")
    held = Target(path, device, torch.float32)
    loaded = load(folder).to(device)
    lines = written()[:4] if args.tiny else written()
    measure("prompts of heldout.txt", loaded, held, tokenizer, lines, args.new)
    measure("prompts held out, of the same forms", loaded, held, tokenizer, prompts(len(lines) * 2, 1, held=True), args.new)
    print(f"all: {time.monotonic() - started:.0f} s")


def around(tokenizer: Tokenizer) -> tuple[str, str]:
    """What the server puts before and behind the one message of a chat."""
    assert tokenizer.chat_template is not None
    mark = "\N{REPLACEMENT CHARACTER}"
    before, behind = (
        ChatTemplate(tokenizer.chat_template, tokenizer.special.names).render([{"role": "user", "content": mark}]).split(mark)
    )
    return before, behind


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """As the server does for a chat of one message."""
    before, behind = around(tokenizer)
    return [tokenizer.encode(before + text + behind, add_special_tokens=False) for text in texts]


def questions(target: Target, tokenizer: Tokenizer, count: int, batch: int, until: float) -> list[str]:
    """What the model itself writes where a user's message begins, at a temperature; finished ones, none that resembles a prompt
    held out."""
    start = tokenizer.encode(around(tokenizer)[0], add_special_tokens=False)
    writer = Writer(target, batch, len(start), QUESTION, tokenizer.eos_ids, sampled=batch, temperature=0.9)
    found: dict[str, None] = {}
    tries = 0
    while len(found) < count and time.monotonic() < until and tries < 4 * count + batch:
        tries += batch
        for tokens in writer([start] * batch):
            text = tokenizer.decode(tokens[:-1]).strip() if tokens[-1] in tokenizer.eos_ids else ""
            if len(text) > 10 and not held_out(text) and not resembles_held_out(text):
                found[text] = None
    return list(found)[:count]


def ask(target: Target, asked: list[list[int]], ends: tuple[int, ...], args: argparse.Namespace, until: float) -> list[Answer]:
    """Full batches of prompts of similar length, in random order, until the time is over."""
    order = sorted(range(len(asked)), key=lambda i: len(asked[i]))
    size = min(args.generate_batch, len(order))
    batches = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
    writer = Writer(target, size, max(map(len, asked)), args.new, ends, round(size * args.sampled), args.temperature)
    found: list[Answer] = []
    shuffle = random.Random(args.seed)
    shuffle.shuffle(batches)
    for numbers in batches:
        if found and time.monotonic() > until:
            break
        shuffle.shuffle(numbers)
        some = [asked[i] for i in numbers]
        found += [(prompt + answer, len(prompt)) for prompt, answer in zip(some, writer(some), strict=True)]
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


def shape_of(target: Target, draft_vocab: int, inner: int) -> Shape:
    return Shape(
        vocab=target.embedding.shape[0],
        draft_vocab=draft_vocab,
        hidden=target.embedding.shape[1],
        inner=inner,
        heads=target.heads,
        kv_heads=target.kv_heads,
        size=target.size,
        theta=target.theta,
        eps=target.eps,
        max_position=int(target.config["max_position_embeddings"]),
    )


@torch.no_grad()
def measure(what: str, head: Head, target: Target, tokenizer: Tokenizer, texts: list[str], new: int) -> None:
    """Print how long drafts for greedy answers are accepted, in float32."""
    asked = encode(tokenizer, texts)
    told = answers_to(target, asked, new, tokenizer.eos_ids)
    answers = [(prompt + answer, len(prompt)) for prompt, answer in zip(asked, told, strict=True)]
    tokens = batch_of(answers, head.t2d.cpu()).tokens.to(target.device)
    columns = torch.arange(tokens.shape[1], device=target.device)
    starts, ends = [start for _, start in answers], [len(ids) for ids, _ in answers]
    wanted = torch.stack([(columns >= start) & (columns < end - 1) for start, end in zip(starts, ends, strict=True)])
    states, final = target.states(tokens)
    own = torch.stack([(row @ target.head.T).argmax(-1) for row in final])
    following = F.pad(tokens[:, 1:], (0, 1))
    matches = []
    for state in head(F.embedding(tokens, target.embedding), states, REPORTED):
        drafted = torch.stack([head.kept[head.lm_head(row).argmax(-1)] for row in state])
        matches.append(drafted == following)
    agree = " ".join(f"{(one & wanted).sum().item() / wanted.sum().item():.3f}" for one in matches)
    same = ((own == following) & wanted).sum().item() / wanted.sum().item()
    for most in (new // 2, new):
        cut = [min(start + most, end) for start, end in zip(starts, ends, strict=True)]
        length = mean_accepted_length(torch.stack(matches, 1), starts, cut)
        print(f"{what}: mean accepted length at K = {REPORTED}, greedy: {length:.3f} (answers of up to {most} tokens)")
    print(f"{what}: drafts that are the target's own choice, by depth: {agree}")
    print(f"{what}: {len(texts)} prompts, {int(wanted.sum())} tokens, of which {same:.2%} are the target's choice again")
    print(f"  {texts[0]!r} → {tokenizer.decode(told[0])[:300]!r}", flush=True)


if __name__ == "__main__":
    main()
