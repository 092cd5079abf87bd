"""Mixture of experts: choosing experts for each token, and adding up what they compute.

`layers/moe.py` calls `route` and `combine`; `combine_reference` is the plain definition that the tests compare with.
Every sum over experts runs in a fixed order (by expert number), so that a token's result does not depend on what else is in the
batch as long as the expert itself does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Expert = Callable[[int, Tensor], Tensor]
"""`expert(e, rows [n, hidden]) → [n, hidden]`: what routed expert e makes of its tokens."""


@dataclass(frozen=True, slots=True)
class Routing:
    """How a router picks. Formulas: Transformers' `deepseek_v2`, `deepseek_v3`, `longcat_flash`, `qwen3_moe`."""

    experts: int
    """Routed experts that compute something; ids 0 … experts - 1."""
    top_k: int
    zero_experts: int = 0
    """Experts that return their input; ids experts … experts + zero_experts - 1."""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    groups: int = 1
    """Experts are split in this many groups of equal size, of which only the best `top_groups` may be chosen from."""
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    """A group's score: its best expert's, or the sum of its two best."""
    renormalise: bool = False
    """Divide the chosen weights by their sum."""
    scale: float = 1.0
    """Multiplies the weights at the end."""
    shared: int = 0
    """Experts that every token has, with weight 1, without a say of the router; ids experts … experts + shared - 1. Only
    without zero experts."""

    @property
    def each(self) -> int:
        """Experts of a token."""
        return self.top_k + self.shared

    @property
    def total(self) -> int:
        return self.experts + self.zero_experts

    @property
    def nothing(self) -> int:
        """The id of no expert, which who has none has in each place. Products leave out all ids behind those of experts with
        weights."""
        return self.total + self.shared


@dataclass(frozen=True, slots=True)
class LiveRows:
    """Which of T tokens somebody needs: not those of inert rows, whose KV goes to the scratch page (`core.batch.Batch`)."""

    kv_rows: Tensor
    """[R] int64, of a pass's rows."""
    page_size: int
    picked: Tensor | None = None
    """[T] int64, the tokens' rows in the pass; None: token t is row t."""

    def inert(self) -> Tensor:
        """[T] bool."""
        rows = self.kv_rows if self.picked is None else self.kv_rows[self.picked]
        return rows < self.page_size

    def whole(self) -> bool:
        """Is it known that no row of the pass is inert? On a CPU, for a tenth of what it takes to treat them; a GPU is not
        waited for."""
        return self.kv_rows.device.type == "cpu" and min(self.kv_rows.tolist(), default=self.page_size) >= self.page_size


def route(logits: Tensor, routing: Routing, bias: Tensor | None = None, live: LiveRows | None = None) -> tuple[Tensor, Tensor]:
    """Logits [T, total] float32, bias [total] float32 → weights [T, each] float32, ids [T, each] int64, shared experts last.

    The bias takes part in the choice only; the weights are the unbiased scores. Tokens that nobody needs have no experts,
    shared ones neither: their ids are `routing.nothing`, their weights 0. `live` None: all are needed.
    """
    scores = logits.softmax(-1) if routing.scores == "softmax" else ordered_sigmoid(logits)
    choice = scores if bias is None else scores + bias
    if routing.groups > 1:
        grouped = choice.unflatten(-1, (routing.groups, -1))
        if routing.group_score == "max":
            group_scores = grouped.amax(-1)
        else:
            two = grouped.topk(2, dim=-1).values
            group_scores = two[..., 0] + two[..., 1]
        kept = torch.zeros_like(group_scores, dtype=torch.bool)
        kept.scatter_(-1, group_scores.topk(routing.top_groups, dim=-1).indices, True)
        choice = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
    ids = choice.topk(routing.top_k, dim=-1).indices
    weights = scores.gather(-1, ids)
    if routing.renormalise:
        weights = weights / (ordered_sum(weights).unsqueeze(-1) + 1e-20)
    weights = weights * routing.scale
    if routing.shared:
        everyone = torch.arange(routing.experts, routing.experts + routing.shared, device=ids.device).expand(ids.shape[0], -1)
        weights = torch.cat((weights, torch.ones(everyone.shape, device=weights.device)), -1)
        ids = torch.cat((ids, everyone), -1)
    if live is not None and not live.whole():
        inert = live.inert().unsqueeze(-1)
        weights, ids = weights.masked_fill(inert, 0.0), ids.masked_fill(inert, routing.nothing)
    return weights, ids


def combine(x: Tensor, weights: Tensor, ids: Tensor, expert: Expert, routing: Routing) -> Tensor:
    """Σ_k weights[t, k] · expert(ids[t, k], x[t]) → [T, hidden] in x's dtype; only chosen experts are called.

    Tokens are sorted by expert, so that each expert's weights are read once. Sums are float32, in order of expert number, then
    the zero experts.
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    if not ids.numel():
        return out.to(x.dtype)
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    rows_by_expert = order // ids.shape[1]
    weights_by_expert = weights.flatten()[order].unsqueeze(-1)
    start = 0
    computing = routing.experts + routing.shared
    for number, count in enumerate(flat.bincount(minlength=max(routing.total, computing))[:computing].tolist()):
        if count:
            rows = rows_by_expert[start : start + count]
            computed = expert(number, x[rows])
            out.index_add_(0, rows, computed.float() * weights_by_expert[start : start + count])
            start += count
    if routing.zero_experts:
        kept = ordered_sum(weights.masked_fill(ids < routing.experts, 0.0))
        out += kept.unsqueeze(-1) * x.float()
    return out.to(x.dtype)


def combine_reference(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The definition, one token and one expert at a time, in float32.

    x [T, hidden], weights and ids [T, top_k], gate_up [E, 2 · inner, hidden] (gate rows first), down [E, hidden, inner]; an id
    of E or more is a zero expert → [T, hidden] float32.
    """
    out = torch.zeros(x.shape, dtype=torch.float32)
    for token in range(x.shape[0]):
        row = x[token].float()
        for weight, number in zip(weights[token], ids[token].tolist(), strict=True):
            if number >= gate_up.shape[0]:
                out[token] += weight * row
                continue
            gate, up = (gate_up[number].float() @ row).chunk(2)
            out[token] += weight * (down[number].float() @ (F.silu(gate) * up))
    return out


def ordered_sum(values: Tensor) -> Tensor:
    """[..., n] → [...]: the sum from left to right, whatever the other dimensions are."""
    return values.cumsum(-1)[..., -1]


def ordered_sigmoid(logits: Tensor) -> Tensor:
    """The logistic function, bit for bit the same for a row whatever the number of rows.

    torch computes the last few elements of a tensor with another `exp` than the rest; softmax runs row by row, and
    sigmoid(x) is the second of softmax((0, x)).
    """
    return torch.stack((torch.zeros_like(logits), logits), dim=-1).softmax(-1)[..., 1]
