"""Ways of the Hopper MLA decode side by side: `mla_decode.py --variants`.

All variants' kernels are compiled first, on several threads. Each variant is then checked on the shape itself and on a ragged
batch with inert sequences, against float64 and against itself, and timed: alone, and behind the launch that quantises its
queries (what is launched early gains there only). A variant that fails is named, and the others go on; one that hangs ends the
process, with its name: name the rest by `--only`.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from mla_decode import SCALE, Case, Shape

from fluentllm.kernels.mla_decode import fp8_planes, plan, quantise, switches
from fluentllm.kernels.mla_decode.decode import MOST_SWAPPED
from fluentllm.kernels.mla_decode.reference import decode_reference, quantised_query
from fluentllm.kernels.triton.launch import recording
from fluentllm.prewarm import Compiler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from timing import Timer

PAGES, MAPS, EARLY, TOGETHER = "PAGES_IN_RECORD", "FETCH_MAPS", "LAUNCH_EARLY", "MERGE_TOGETHER"
SWAP, REGISTERS, CLUSTERS = "SWAP_OPERANDS", "VALUES_IN_REGISTERS", "CLUSTERS"
LATENT_FIRST = "LATENT_FIRST"
NAMES = (PAGES, MAPS, EARLY, TOGETHER, SWAP, REGISTERS, CLUSTERS, LATENT_FIRST)
TILES = "tiles"
"""The variant whose plan takes whole pieces only where they are no longer than tiles (`plan.SLACK` 0)."""
PATIENCE = 120.0
"""Seconds without a result after which the process ends."""
LIMIT = 5e-3
"""Of the error relative to float64: BF16's rounding of the output is 1.1e-3 in the mean, the kernels' own below 2e-3."""


def variants(shape: Shape) -> dict[str, tuple[str, ...]]:
    """Names and switches, the boldest last."""
    rows = shape.heads * shape.q_len
    own: tuple[str, ...] = (REGISTERS,) if shape.kv == "fp8" else ()
    if rows <= MOST_SWAPPED[shape.kv]:
        own = (SWAP,)
    found: dict[str, tuple[str, ...]] = {"base": ()}
    found |= {{SWAP: "swap", REGISTERS: "registers"}[one]: (one,) for one in own}
    if REGISTERS in own:
        found["registers latent first"] = (*own, PAGES, MAPS, EARLY, LATENT_FIRST)
    found |= {"pages": (PAGES,), "maps": (MAPS,), "pages maps": (PAGES, MAPS), "early": (EARLY,)}
    found |= {"pages maps early": (PAGES, MAPS, EARLY)}
    found |= {"all apart": (*own, PAGES, MAPS, EARLY), "together": (TOGETHER,), "pages together": (PAGES, TOGETHER)}
    if shape.kv == "fp8" and rows > 64:
        found |= {"clusters": (CLUSTERS,), "clusters early": (CLUSTERS, EARLY)}
        found |= {"clusters latent first": (CLUSTERS, EARLY, LATENT_FIRST)}
    if own:
        found["own pages together"] = (*own, PAGES, TOGETHER)
    return found | {
        "all but maps": (*own, PAGES, EARLY, TOGETHER),
        "all": (*own, PAGES, MAPS, EARLY, TOGETHER),
        TILES: (),
        "base again": (),
    }


@contextmanager
def applied(name: str, on: tuple[str, ...]) -> Iterator[None]:
    before, slack = {one: getattr(switches, one) for one in NAMES}, plan.SLACK
    try:
        plan.SLACK = 0 if name == TILES else slack
        for one in NAMES:
            setattr(switches, one, one in on)
        yield
    finally:
        plan.SLACK = slack
        for one, value in before.items():
            setattr(switches, one, value)


class Watch:
    """Ends the process where nothing is heard for too long: a kernel that hangs cannot be interrupted."""

    def __init__(self) -> None:
        self.doing, self._heard = "start", time.monotonic()
        threading.Thread(target=self._look, daemon=True).start()

    def hear(self, doing: str) -> None:
        self.doing, self._heard = doing, time.monotonic()

    def _look(self) -> None:
        while time.monotonic() - self._heard < PATIENCE:
            time.sleep(1)
        print(f"FAILED {self.doing}: hangs", flush=True)
        os._exit(3)


def reference(case: Case) -> torch.Tensor:
    q_latent, q_rope, cache = case.q_latent.double(), case.q_rope.double(), case.pool
    if case.shape.kv == "fp8":
        q_latent, q_rope = quantised_query(case.q_latent, case.q_rope)
        cache = fp8_planes(case.pool)
    return decode_reference(q_latent, q_rope, cache, case.table, case.lengths, SCALE, dtype=torch.float64)


def checked(case: Case, expected: torch.Tensor) -> float:
    """Error relative to `expected`; raises RuntimeError if it is too large, or moves."""
    run, found = case.runner(), []
    for _ in range(3):
        case.out.fill_(torch.nan)
        case.decode.partial.fill_(torch.nan)
        case.decode.lse.fill_(torch.nan)
        found.append(run().clone())
    error = float((found[0].double() - expected).norm() / expected.norm())
    if not error < LIMIT:
        raise RuntimeError(f"error {error:.1e}")
    if not all(torch.equal(found[0], other) for other in found[1:]):
        raise RuntimeError("a moving result")
    return error


def behind(case: Case) -> Callable[[], torch.Tensor]:
    """The decode with the launch in front that quantises its queries (for BF16 one like it)."""
    run = case.runner()

    def chain() -> torch.Tensor:
        quantise.quantise_query(case.q_latent.flatten(0, 1), case.q_rope.flatten(0, 1))
        return run()

    return chain


def compile_all(cases: list[Case], wanted: list[str] | None) -> None:
    started = time.monotonic()
    with Compiler(torch.device("cuda", torch.cuda.current_device())) as compiler:
        for case in cases:
            for name, on in variants(case.shape).items():
                if wanted is None or name in wanted:
                    with applied(name, on), recording() as launches:
                        case.plan()
                        case.runner()()
                    compiler.add(launches)
    print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)


def compare(shapes: list[Shape], timer: Timer, wanted: list[str] | None) -> list[dict[str, object]]:
    """Prints a line a variant → its rows."""
    watch, rows = Watch(), []
    cases = [(Case(shape, uneven=False), ragged(shape)) for shape in shapes]
    compile_all([case for pair in cases for case in pair], wanted)
    for shape, pair in zip(shapes, cases, strict=True):
        watch.hear(f"reference of {shape}")
        expected = [reference(case) for case in pair]
        base: tuple[float, float] | None = None
        named = f"{shape.kv} heads {shape.heads} q {shape.q_len} batch {shape.batch} ctx {shape.ctx}"
        print(f"{named}, floor {pair[0].floor()[2]:.1f}", flush=True)
        for name, on in variants(shape).items():
            if wanted is not None and name not in wanted:
                continue
            watch.hear(f"{name} of {shape}")
            try:
                with applied(name, on):
                    for case in pair:
                        case.plan()
                    errors = [checked(case, exact) for case, exact in zip(pair, expected, strict=True)]
                    times = timer(pair[0].runner()), timer(behind(pair[0]))
            except Exception as error:
                print(f"  {name:20} FAILED {type(error).__name__}: {str(error).splitlines()[0][:120]}", flush=True)
                continue
            base = base or times
            alone, after = times
            print(f"  {name:20} {alone:7.2f} {alone - base[0]:+6.2f}   behind {after:7.2f} {after - base[1]:+6.2f}"
                  f"   error {errors[0]:.0e} {errors[1]:.0e}", flush=True)  # fmt: skip
            rows.append(vars_of(shape) | {"variant": name, "us": alone, "behind_us": after, "errors": errors})
    return rows


def ragged(shape: Shape) -> Case:
    """A batch in which parts end one sequence and begin others, and some sequences have no keys."""
    return Case(Shape(shape.heads, shape.q_len, 23, 3000, shape.kv), uneven=True, inert=True)


def vars_of(shape: Shape) -> dict[str, object]:
    return {"heads": shape.heads, "q_len": shape.q_len, "batch": shape.batch, "ctx": shape.ctx, "kv": shape.kv}
