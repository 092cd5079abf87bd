"""Trains the MTP layer of a finished model further, on what the model itself writes: all else stays as it is, bit for bit.

Half of each sequence is text, half is the model's own greedy continuation of it, as in serving. At every row and depth the
layer learns the model's distribution.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from ..drafting import Budget
from .data import Crops
from .model import Longcat


@torch.no_grad()
def continuations(model: Longcat, crops: Crops, batch: int, length: int, until: float, most: int) -> Tensor:
    """[N, length] int64, until the time is over or there are `most`: the first half text, then greedy."""
    found: list[Tensor] = []
    while not found or (time.monotonic() < until and sum(map(len, found)) < most):
        tokens = crops(batch, length // 2 - 1)
        while tokens.shape[1] < length:
            tokens = torch.cat((tokens, model.logits(model(tokens)[:, -1:]).argmax(-1)), 1)
        found.append(tokens)
    return torch.cat(found)


def fit_drafts(model: Longcat, sequences: Tensor, budget: Budget, batch: int, rate: float, depths: int, seed: int) -> None:
    model.eval().requires_grad_(False)
    model.mtp.requires_grad_(True)
    device = sequences.device
    matrices = [p for p in model.mtp.parameters() if p.dim() == 2]
    others = [p for p in model.mtp.parameters() if p.dim() != 2]
    steppers = [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    random = torch.Generator().manual_seed(seed)
    order: list[int] = []
    began = time.monotonic()
    while budget.done < 1:
        if len(order) < batch:
            order = torch.randperm(len(sequences), generator=random).tolist()
        chosen, order = order[:batch], order[batch:]
        tokens = sequences[torch.tensor(chosen, device=device)]
        with torch.no_grad():
            hidden = model(tokens)
            wanted = model.logits(hidden).log_softmax(-1).flatten(0, 1)
        by_depth = []
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            for depth, state in enumerate(model.drafts(tokens, hidden, depths)):
                drafted = model.logits(state).float().log_softmax(-1).flatten(0, 1)
                apart = F.kl_div(drafted, wanted, log_target=True, reduction="none").sum(-1).view(tokens.shape)
                by_depth.append(apart[:, depth:].mean())
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = rate * budget.rate()
            stepper.zero_grad()
        torch.stack(by_depth).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.mtp.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
        budget.step += 1
        if budget.step in (1, 10, 100) or budget.step % 250 == 0:
            shown = " ".join(f"{one.item():.3f}" for one in by_depth)
            print(
                f"step {budget.step:5} {budget.done:4.0%} {time.monotonic() - began:4.0f} s apart by depth {shown}", flush=True
            )
    model.eval()
