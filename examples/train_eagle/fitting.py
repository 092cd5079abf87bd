"""Fits the head to answers: batches of one shape each, and the loss at every depth.

The target's states are computed again at every step: on a GPU that is cheaper than keeping them, 4.6 kB a token. Nothing in a
step waits for the device, and the sizes of a step's tensors are few, so memory is taken once.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..drafting import Budget
from .head import Head
from .target import Target

DEPTHS = 3
"""How often the head reads its own output in training: as many drafts as are usual."""
DECAY = 0.8
"""Weight of a depth's loss beside that of the depth before."""
MUON = 4.0
"""Muon's rate beside AdamW's. Its steps are scaled to the size of AdamW's; it bears larger ones, which AdamW does not."""
STRIDE = 64
"""Rows of a sequence are padded to a multiple of this."""
Answer = tuple[list[int], int]
"""Tokens of the prompt and of the answer, and how many are the prompt's."""


@dataclass(frozen=True, slots=True)
class Batch:
    tokens: Tensor
    """[B, T] int64, padded behind; T - 1 is a multiple of STRIDE."""
    rows: Tensor
    """[N] int64 into B · T: rows that draft, whose next token the head knows."""


def batches(answers: list[Answer], tokens: int, seed: int) -> list[list[Answer]]:
    """One epoch in random order: sequences whose rows come to the same multiple of STRIDE, about `tokens` rows of them."""
    random = torch.Generator().manual_seed(seed)
    by_length: dict[int, list[Answer]] = {}
    for i in torch.randperm(len(answers), generator=random).tolist():
        by_length.setdefault(width(len(answers[i][0])), []).append(answers[i])
    found = []
    for length, some in by_length.items():
        size = max(1, tokens // (length - 1))
        found += [some[i : i + size] for i in range(0, len(some), size)]
    return [found[i] for i in torch.randperm(len(found), generator=random).tolist()]


def width(length: int) -> int:
    return -(-(length - 1) // STRIDE) * STRIDE + 1


def batch_of(some: list[Answer], known: Tensor) -> Batch:
    """known [vocabulary] bool, on the CPU: the tokens that the head can draft."""
    length = width(max(len(tokens) for tokens, _ in some))
    tokens = torch.zeros(len(some), length, dtype=torch.int64)
    wanted = torch.zeros(len(some), length, dtype=torch.bool)
    for row, (ids, start) in enumerate(some):
        tokens[row, : len(ids)] = torch.tensor(ids)
        wanted[row, start : len(ids) - 1] = True
    rows = (wanted & F.pad(known[tokens][:, 1:], (0, 1))).flatten().nonzero().flatten()
    granule = max(1, len(some) * length // 16)
    if len(rows) > granule:  # of few sizes, lest every step's tensors want memory of their own
        rows = rows[torch.randperm(len(rows))[: len(rows) // granule * granule]]
    return Batch(tokens, rows)


def optimizers(head: Head, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layer's matrices; AdamW for the output matrix, whose rows are tokens, and for norms."""
    layer = [p for name, p in head.named_parameters() if p.dim() == 2 and not name.startswith("lm_head")]
    rest = [p for name, p in head.named_parameters() if p.dim() != 2 or name.startswith("lm_head")]
    fused = rest[0].device.type == "cuda"
    return [
        torch.optim.Muon(layer, lr=MUON * rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.05, fused=fused),
    ]


def fit(head: Head, target: Target, answers: list[Answer], budget: Budget, tokens: int, rate: float, seed: int) -> None:
    """Steps of `tokens` rows each."""
    device = target.device
    steppers = optimizers(head, rate)
    for group in (group for stepper in steppers for group in stepper.param_groups):
        group["initial_lr"] = group["lr"]
    known = head.t2d.cpu()
    vectors = target.head[head.kept].float()
    began, epoch, rows = time.monotonic(), 0, 0
    while budget.done < 1:
        for some in batches(answers, tokens, seed + epoch):
            batch = batch_of(some, known)
            if not len(batch.rows):
                continue
            ids, at = moved(batch.tokens, device), moved(batch.rows, device)
            states, final = target.states(ids)
            if budget.step == 0:
                head.measure_units(states.flatten(0, 1)[at])
            # The target's own distribution over the tokens that the head knows.
            own = (final.flatten(0, 1)[at].float() @ vectors.T).softmax(-1)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                by_depth = losses(head, F.embedding(ids, target.embedding), states, at, own)
            loss = sum(DECAY**depth * one for depth, one in enumerate(by_depth))
            for stepper in steppers:
                for group in stepper.param_groups:
                    group["lr"] = group["initial_lr"] * budget.rate()
                stepper.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            for stepper in steppers:
                stepper.step()
            budget.step += 1
            rows += batch.tokens.numel()
            if budget.step in (1, 10, 100) or budget.step % 250 == 0:
                shown = " ".join(f"{one.item():.3f}" for one in by_depth)
                seconds = time.monotonic() - began
                print(
                    f"step {budget.step:5} epoch {epoch} {budget.done:4.0%} {seconds:4.0f} s loss by depth {shown} "
                    f"{rows / seconds / 1e3:.0f} k tokens/s",
                    flush=True,
                )
            if budget.done >= 1:
                break
        if not budget.step:
            raise ValueError("the head knows no token of the answers")
        epoch += 1


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device, without waiting for what it does now."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def losses(head: Head, words: Tensor, states: Tensor, at: Tensor, own: Tensor) -> list[Tensor]:
    """Cross entropy by depth. A chain starts with a row of the answer or the prompt's last, which all rows have before them."""
    rows = (state.flatten(0, 1)[at] for state in head(words, states, DEPTHS))
    return [F.cross_entropy(head.lm_head(row).float(), own) for row in rows]
