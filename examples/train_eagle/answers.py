"""What a model answers to many prompts at once: every step is the same static program, a CUDA graph where there is CUDA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..drafting import rotary
from .target import Target

STRIDE = 64
"""A step's attention reads a multiple of so many columns; each is a program of its own."""


class Writer:
    """Answers batches of `batch` prompts of up to `longest` tokens with up to `new` tokens each.

    The first `sampled` rows draw at a temperature, the others take the likeliest token. The prompts of a batch end in the same
    column; what is before them is padding.
    """

    def __init__(
        self,
        target: Target,
        batch: int,
        longest: int,
        new: int,
        ends: tuple[int, ...],
        sampled: int = 0,
        temperature: float = 1.0,
    ) -> None:
        self.target, self.batch, self.new = target, batch, new
        self.sampled, self.temperature = sampled, temperature
        device = target.device
        width = -(-(longest + new) // STRIDE) * STRIDE
        shape = target.layers, batch, target.kv_heads, width, target.size
        self.keys = torch.zeros(shape, dtype=target.dtype, device=device)
        self.values = torch.zeros(shape, dtype=target.dtype, device=device)
        self.columns = torch.arange(width, device=device)
        self.rows = rotary(width, target.size, target.theta, device)
        self.head = target.head.float()  # bfloat16 is too coarse to tell the likeliest of 49,152
        self.ends = torch.tensor(ends, device=device)
        self.noise = torch.zeros(sampled, self.head.shape[0], device=device)
        self.pads = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)
        """Column of the newest token."""
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.found = torch.zeros(batch, new, dtype=torch.int64, device=device)
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.captures = device.type == "cuda"

    @torch.no_grad()
    def __call__(self, prompts: list[list[int]]) -> list[list[int]]:
        """The end token, where one came, is included."""
        assert len(prompts) == self.batch, (len(prompts), self.batch)
        width = max(map(len, prompts))
        self._read([[0] * (width - len(prompt)) + prompt for prompt in prompts], [width - len(prompt) for prompt in prompts])
        done = 1
        while done < self.new and (done % 16 or not bool(self.finished.all())):
            self._step(-(-(width + done) // STRIDE) * STRIDE)
            done += 1
        last = set(self.ends.tolist())
        answers = []
        for row in self.found[:, :done].tolist():
            cut = next((i + 1 for i, token in enumerate(row) if token in last), len(row))
            answers.append(row[:cut])
        return answers

    def _read(self, prompts: list[list[int]], pads: list[int]) -> None:
        """The prompts' keys and values, and the first token of each answer."""
        target, device = self.target, self.target.device
        width = len(prompts[0])
        self.pads.copy_(torch.tensor(pads).unsqueeze(1))
        columns = self.columns[:width]
        seen = (columns <= columns.unsqueeze(1)) & (columns >= self.pads.unsqueeze(1))
        seen |= columns == columns.unsqueeze(1)  # padding sees itself, lest softmax divide by zero
        mask = seen.unsqueeze(1)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer, :, :, :width] = k
            self.values[layer, :, :, :width] = v
            return F.scaled_dot_product_attention(q, target.repeat(k), target.repeat(v), attn_mask=mask)

        # Rotary cares for distances only, so the padding in front may count.
        rows = self.rows[0][:width], self.rows[1][:width]
        _, hidden = target.forward(torch.tensor(prompts, device=device), rows, attend)
        self.at.fill_(width)
        self.count.zero_()
        self.finished.zero_()
        self._draw()
        self._choose(hidden[:, -1])

    def _step(self, end: int) -> None:
        """One token more; all columns in use are before `end`."""
        self._draw()
        if self.captures and end not in self.graphs:
            self._capture(end)
        if self.captures:
            self.graphs[end].replay()
        else:
            self._program(end)

    def _draw(self) -> None:
        if self.sampled:
            self.noise.exponential_().log_()

    def _program(self, end: int) -> None:
        """Reads the newest tokens and chooses the next. It waits for nothing and allocates nothing that outlives it."""
        target = self.target
        columns = self.columns[:end]
        mask = ((columns <= self.at) & (columns >= self.pads)).view(self.batch, 1, 1, end)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer].index_copy_(2, self.at, k)
            self.values[layer].index_copy_(2, self.at, v)
            k, v = self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
            grouped = q.reshape(self.batch, target.kv_heads, -1, target.size)
            scores = (grouped @ k.transpose(2, 3)).float() * target.size**-0.5
            shares = scores.masked_fill(~mask, float("-inf")).softmax(-1).to(q.dtype)
            return (shares @ v).reshape(self.batch, target.heads, 1, target.size)

        rows = self.rows[0].index_select(0, self.at), self.rows[1].index_select(0, self.at)
        _, hidden = target.forward(self.tokens, rows, attend)
        self.at += 1
        self._choose(hidden[:, -1])

    def _choose(self, hidden: Tensor) -> None:
        logits = hidden.float() @ self.head.T
        if self.sampled:
            logits[: self.sampled] -= self.temperature * self.noise
        chosen = logits.argmax(-1, keepdim=True)
        self.found.index_copy_(1, self.count, chosen)
        self.finished |= (chosen == self.ends).any(1)
        self.tokens.copy_(chosen)
        self.count += 1

    def _capture(self, end: int) -> None:
        """The program for `end`, recorded; the state is as before. Without a recording, steps run one by one."""
        state = self.at, self.count, self.tokens, self.found, self.finished
        before = [tensor.clone() for tensor in state]
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._program(end)
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            pool = next((graph.pool() for graph in self.graphs.values()), None)
            with torch.cuda.graph(graph, pool=pool):
                self._program(end)
            self.graphs[end] = graph
        except RuntimeError as error:
            print(f"no CUDA graph, so steps are slower: {error}", flush=True)
            torch.cuda.synchronize()
            self.captures = False
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)


def answers_to(
    target: Target, prompts: list[list[int]], new: int, ends: tuple[int, ...], temperature: float = 0.0
) -> list[list[int]]:
    """One batch of all prompts."""
    sampled = len(prompts) if temperature else 0
    return Writer(target, len(prompts), max(map(len, prompts)), new, ends, sampled, temperature or 1.0)(prompts)
