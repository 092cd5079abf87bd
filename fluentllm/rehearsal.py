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

    Make = Callable[[int, int], Parts]
    """Pages of the pool, slots → programs over a pool of that many and tables of their own."""

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


def measure(make: Make, largest: Largest, device: torch.device, share: float, pool: int = 0) -> Room:
    """Room for the KV pool of a CUDA device, with the memory of the largest steps taken.

    Raises `OutOfMemory` where these do not fit, naming settings with which they do: they were tried. Where the steps leave less
    than `pool` bytes, `Room.smaller` names settings that leave as much.
    """
    room = _room(make, largest, device, share)
    if not isinstance(room, Room):
        raise _do_not_fit(make, largest, device) from room
    if room.usable < pool <= room.usable + room.workspace:
        room = replace(room, smaller=smaller(largest, lambda tried: _leaves(_room(make, tried, device, share), pool)))
    return room


def smaller(largest: Largest, fits: Callable[[Largest], bool]) -> str:
    """Settings that make steps smaller until they fit, for an error to advise; empty where the smallest do not either.

    As few as can be: the prompt tokens of a step, else its sequences, else both. `fits` is asked for the smallest first.
    """
    tokens, sequences = (_halves(count, least) for count, least in ((largest.prefill_tokens, 16), (largest.sequences, 1)))
    both = [(min(tokens, default=largest.prefill_tokens), count) for count in sequences]
    for pairs in ([(count, largest.sequences) for count in tokens], [(largest.prefill_tokens, n) for n in sequences], both):
        tries = [replace(largest, prefill_tokens=count, sequences=n) for count, n in pairs]
        if not tries or not fits(tries[-1]):
            continue
        found = next((tried for tried in tries[:-1] if fits(tried)), tries[-1])
        changes = {"scheduler.prefill_tokens": found.prefill_tokens, "scheduler.max_running": found.sequences}
        before = (largest.prefill_tokens, largest.sequences)
        named = [f"{name} to {value}" for (name, value), old in zip(changes.items(), before, strict=True) if value != old]
        return " and ".join(named)
    return ""


def _halves(count: int, least: int) -> list[int]:
    """Half of it, a quarter … and not less than `least`."""
    found = []
    while (count := count // 2) >= least:
        found.append(count)
    return found


def _leaves(room: Room | torch.OutOfMemoryError, pool: int) -> bool:
    return isinstance(room, Room) and room.usable >= pool


def _room(make: Make, largest: Largest, device: torch.device, share: float) -> Room | torch.OutOfMemoryError:
    workspace = _try(make, largest, device)
    if not isinstance(workspace, int):
        return workspace
    free, total = torch.cuda.mem_get_info(device)
    return Room(free - workspace, total, workspace, share)


def _try(make: Make, largest: Largest, device: torch.device) -> int | torch.OutOfMemoryError:
    """Bytes that the largest steps took and gave back, or what they failed with."""
    _give_back(device)
    try:
        parts = make(1, largest.sequences)
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
    message = (
        f"Steps of {largest.prefill_tokens} prompt tokens, or of {largest.sequences} sequences, do not fit beside the weights "
        f"on {device}."
    )
    advice = smaller(largest, lambda tried: isinstance(_try(make, tried, device), int))
    if not advice:
        fix = (
            "Set model.max_model_len lower, free memory on the GPU, or choose a smaller model: smaller steps do not fit either."
        )
        return OutOfMemory(message, fix=fix, param="model.max_model_len")
    return OutOfMemory(message, fix=f"Set {advice}.", param=advice.partition(" ")[0])


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
