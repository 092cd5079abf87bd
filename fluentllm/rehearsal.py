"""The largest steps, run once before anyone waits: how much memory they take beside weights and pool, kernels compiled.

The steps are real ones through the real executor. They need no pool to speak of: their pages are all the scratch page.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from msgspec import structs

from .core.buckets import CAPTURED_KEYS, CAPTURED_TOKENS
from .core.errors import OutOfMemory
from .core.executor import Executor
from .core.types import Drafting, Feature, PrefillChunk, SamplingParams, SlotInit, StepPlan
from .memory import Room

if TYPE_CHECKING:
    from collections.abc import Callable

    from .core.executor import Programs
    from .core.slots import SlotTables

    class Parts(Protocol):
        @property
        def programs(self) -> Programs: ...

        @property
        def tables(self) -> SlotTables: ...

    Make = Callable[[int], Parts]
    """Pages of the pool → programs over a pool of that many and tables of their own."""

EVERY_FEATURE = Feature.SAMPLING | Feature.PENALTIES | Feature.BIAS | Feature.LOGPROBS | Feature.FILTER | Feature.MIN_TOKENS


@dataclass(frozen=True, slots=True)
class Largest:
    """What a step may hold at most."""

    prefill_tokens: int
    sequences: int
    context: int
    """Tokens of the longest sequence, prompt and answer."""
    drafts: int = 0
    whole_context: bool = False
    """Does prefill's workspace grow with what was computed before (MLA in expanded form)? Then the chunk ends at `context`."""
    grammars: bool = False
    """May requests have grammars? Their masks are as wide as the logits."""


def measure(make: Make, largest: Largest, device: torch.device, share: float) -> Room:
    """Room for the KV pool of a CUDA device, with the memory of the largest steps taken.

    Raises `OutOfMemory` naming the `scheduler.prefill_tokens` that fit, if these do not.
    """
    _, total = torch.cuda.mem_get_info(device)
    error = _try(make, largest, device)
    if isinstance(error, int):
        workspace = error
    else:
        raise _do_not_fit(make, largest, device) from error
    free, _ = torch.cuda.mem_get_info(device)
    return Room(free - workspace, total, workspace, share)


def _try(make: Make, largest: Largest, device: torch.device) -> int | torch.OutOfMemoryError:
    """Bytes that the largest steps took and gave back, or what they failed with."""
    _give_back(device)
    try:
        parts = make(1)
        parts.programs.rehearses = True
        executor = Executor(parts.programs, parts.tables)
        try:
            for plan in plans(largest):
                executor.launch(plan).result()
            torch.cuda.synchronize(device)
            taken, _ = torch.cuda.mem_get_info(device)
        finally:
            executor.close()
            del parts, executor
    except torch.OutOfMemoryError as error:
        return error.with_traceback(None)  # its frames hold tensors
    _give_back(device)
    return max(0, torch.cuda.mem_get_info(device)[0] - taken)


def _do_not_fit(make: Make, largest: Largest, device: torch.device) -> OutOfMemory:
    """Looks for a chunk that fits, so that the error can name it."""
    message = (
        f"Steps of {largest.prefill_tokens} prompt tokens, or of {largest.sequences} sequences, do not fit beside the weights "
        f"on {device}."
    )
    fits = largest.prefill_tokens // 2
    while fits >= 16:
        smaller = replace(largest, prefill_tokens=fits)
        if isinstance(_try(make, smaller, device), int):
            return OutOfMemory(message, fix=f"Set scheduler.prefill_tokens to {fits}.", param="scheduler.prefill_tokens")
        fits //= 2
    sequences = max(1, largest.sequences // 4)
    fix = f"Set scheduler.max_running to {sequences} or less, or model.max_model_len lower, or free memory on the GPU."
    return OutOfMemory(message, fix=fix, param="scheduler.max_running")


def _give_back(device: torch.device) -> None:
    """What torch has cached and nobody uses."""
    import gc

    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()


def plans(largest: Largest) -> list[StepPlan]:
    """A prefill of the largest chunk, and the largest that is captured, then decode steps of every slot, with every feature and
    without any. Three of what is captured: its second run is, and the third replayed. Drafts in all of them."""
    every, none = Drafting(largest.drafts, largest.drafts), Drafting(0, largest.drafts)
    features = EVERY_FEATURE | (Feature.GRAMMAR | Feature.TOKEN_MASKS if largest.grammars else 0)
    chunks, admitted = _prompts(largest, largest.prefill_tokens, largest.context)
    again, entering = _prompts(largest, min(largest.prefill_tokens, CAPTURED_TOKENS), min(largest.context, CAPTURED_KEYS))
    again = [structs.replace(chunk, prompt_logprobs=None) for chunk in again]  # they follow what is captured
    slots = list(range(largest.sequences))
    budget = min(8 * (largest.drafts + 1), largest.context - 2)
    decoding = [_init(slot, [0, 0], 2, budget) for slot in slots]
    return [
        StepPlan(step=0, admit=admitted, prefill=chunks, drafting=none, features=features),
        *(StepPlan(step=1 + i, admit=entering, prefill=again, drafting=none) for i in range(3)),
        StepPlan(step=4, admit=decoding, decode=slots, drafting=every, features=features),
        *(StepPlan(step=5 + i, decode=slots, drafting=every) for i in range(3)),
    ]


def _prompts(largest: Largest, tokens: int, context: int) -> tuple[list[PrefillChunk], list[SlotInit]]:
    """As many sequences as a pass of so many tokens needs; a lone one ends at `context` where that counts."""
    chunks, admitted, left = [], [], tokens
    longest = context - 1
    for slot in range(largest.sequences):
        count = min(left, longest)
        if count <= 0:
            break
        start = longest - count if largest.whole_context else 0
        chunks.append(PrefillChunk(slot, start, count, True, prompt_logprobs=0 if slot == 0 else None))
        admitted.append(_init(slot, [0] * (start + count), start + count, 1))
        left -= count
    return chunks, admitted


def _init(slot: int, tokens: list[int], prompt: int, budget: int) -> SlotInit:
    """A request with every feature. Without pages: its rows go to the scratch page."""
    params = SamplingParams(
        max_tokens=budget,
        temperature=1.0,
        top_p=0.9,
        presence_penalty=0.1,
        logit_bias={0: 1.0},
        logprobs=1,
        min_tokens=0,
        seed=1,
    )
    return SlotInit(slot, 0, tokens, prompt, 0, [], params, [])
