"""What both training scripts share: how a draft layer that is applied to its own output attends, and what a draft is worth.

Row p of a draft layer is made of the token at p and a hidden state of position p - 1, and predicts the token at p + 1. At
depth 1 the state is the target's; at depth k it is what the layer gave at depth k - 1 for row p - 1. When an engine drafts
from row s, it has depth 1 for all rows up to s, then depth 2 at s + 1, depth 3 at s + 2 and so on; so that is what a row
may attend to in training too (the "training-time test" of EAGLE-3, arXiv:2503.01840).
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor


def chain_mask(length: int, depth: int, device: torch.device) -> Tensor:
    """[length, depth · length] bool: which keys the rows of depth `depth` see; the keys of depths 1, 2, … lie side by side.

    Row p sees depth 1 up to p - depth + 1, where its chain starts, and of each deeper one the one row of that chain.
    """
    rows = torch.arange(length, device=device).unsqueeze(1)
    keys = torch.arange(length, device=device).unsqueeze(0)
    blocks = [keys <= rows - depth + 1]
    blocks += [keys == rows - depth + k for k in range(2, depth + 1)]
    mask = torch.cat(blocks, dim=1)
    # The first rows have no chain of that depth. They see themselves, lest softmax divide by zero; nobody reads them.
    mask[:, -length:] |= (rows < depth - 1) & (keys == rows)
    return mask


def chain_attention(q: Tensor, keys: list[Tensor], values: list[Tensor], scale: float) -> Tensor:
    """q [B, H, T, d] of depth len(keys); keys [B, H, T, d] and values [B, H, T, v] of each depth → [B, H, T, v]."""
    width = values[-1].shape[-1]
    pad = q.shape[-1] - width  # the fast kernels want one size for all
    values = [F.pad(value, (0, pad)) for value in values]
    if len(keys) == 1:
        out = F.scaled_dot_product_attention(q, keys[0], values[0], is_causal=True, scale=scale)
    else:
        mask = chain_mask(q.shape[2], len(keys), q.device)
        out = F.scaled_dot_product_attention(q, torch.cat(keys, 2), torch.cat(values, 2), attn_mask=mask, scale=scale)
    return out[..., :width]


def back_by_one(states: Tensor) -> Tensor:
    """states [B, T, hidden] → those of the position before; zeros at the first."""
    return F.pad(states, (0, 0, 1, 0))[:, :-1]


def rotary(length: int, size: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, [length, size / 2] float32."""
    frequencies = theta ** -(torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)
    angles = torch.arange(length, device=device, dtype=torch.float32).unsqueeze(1) * frequencies
    return angles.cos(), angles.sin()


def mean_accepted_length(matches: Tensor, starts: list[int], ends: list[int]) -> float:
    """Tokens a verification, the target's own included, if the engine drafted as many tokens as there are depths.

    matches [B, depths, T] bool: whether the draft of depth k + 1 at row p is the token at p + 1. The tokens of sequence b
    from starts[b] to ends[b] are the answer, the first of which the prompt's pass gives.
    """
    depths = matches.shape[1]
    matches = matches.cpu()
    verifications, tokens = 0, 0
    for row, start, end in zip(matches, starts, ends, strict=True):
        at = start  # the newest token
        while at + 1 < end:
            accepted = 0
            while accepted < depths and at + accepted + 1 < end and row[accepted, at + accepted]:
                accepted += 1
            verifications += 1
            tokens += min(accepted + 1, end - 1 - at)
            at += accepted + 1
    return tokens / max(1, verifications)


class Budget:
    """Learning rate over a budget of time: a short linear rise, a plateau, and a linear fall over the last part.

    A run is as long as its budget of minutes, however fast the machine; with `steps`, as long as that.
    """

    def __init__(self, minutes: float, steps: int | None, *, rise: float = 0.02, fall: float = 0.5) -> None:
        self.seconds, self.steps = minutes * 60, steps
        self.rise, self.fall = rise, fall
        self.started = time.monotonic()
        self.step = 0

    @property
    def done(self) -> float:
        """From 0 to 1."""
        if self.steps is not None:
            return min(1.0, self.step / self.steps)
        return min(1.0, (time.monotonic() - self.started) / self.seconds)

    def rate(self) -> float:
        """What to multiply the learning rate with."""
        done = self.done
        return min(1.0, (done + 1e-3) / self.rise, max(0.0, 1.02 - done) / self.fall)
