"""Kernels compiled before they are needed: what steps will launch is recorded on tensors without memory, while weights load.

    Prewarm().start(steps, device, timeline)   …   wait()

Triton compiles at a kernel's first launch, one after the other. Here several processes compile what a first prompt, the
largest prompt and decode steps of every size will launch, into Triton's own caches. It is an optimisation: what is
missed, or fails here, is compiled when it is launched.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Self

import torch

from .core.types import Drafting, Feature, PrefillChunk
from .rehearsal import EVERY_FEATURE

if TYPE_CHECKING:
    from .core.protocols import Model
    from .core.timeline import Timeline
    from .kernels.triton.launch import Launch
    from .rehearsal import Largest
    from .step.decode import Target

    Step = Callable[[Target], object]

log = logging.getLogger(__name__)

META = torch.device("meta")
FAR = 4096
"""Tokens in front of a chunk whose keys are shared by several programs."""
MOST_PROCESSES = 16
LOADERS = 8
"""Threads that load what was compiled: mostly they wait for a C compiler."""


class Prewarm:
    """Compiles in the background, once."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self.compiled = 0
        """Kernels that were asked for, each for one set of types and constants."""
        self._given_up = threading.Event()
        self._compiler: Compiler | None = None

    def start(
        self,
        steps: Callable[[], Iterator[list[Launch]]],
        device: torch.device,
        timeline: Timeline,
        done: Callable[[], None] = lambda: None,
    ) -> None:
        """`steps` gives what each step will launch, the first needed first; it runs on a thread. `done` is called there when
        all have been compiled."""
        arguments = steps, device, timeline, done
        self._thread = threading.Thread(target=self._run, args=arguments, name="fluent-prewarm", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def give_up(self) -> None:
        """Nobody will launch them: end soon, and wait for that."""
        self._given_up.set()
        if self._compiler is not None:
            self._compiler.give_up()
        self.wait()

    def _run(
        self,
        steps: Callable[[], Iterator[list[Launch]]],
        device: torch.device,
        timeline: Timeline,
        done: Callable[[], None],
    ) -> None:
        started = time.time()
        try:
            self._compiler = Compiler(device)
            with self._compiler as compiler, timeline.stage("kernels listed"), torch.inference_mode():
                for launches in steps():
                    if self._given_up.is_set():
                        raise RuntimeError("loading failed")
                    compiler.add(launches)
            self.compiled = compiler.count
            timeline.add(f"{self.compiled} kernels compiled", started, time.time())
            if not compiler.failed:
                done()
        except Exception as error:
            log.info("kernels are compiled when they are launched: %s: %s", type(error).__name__, error)
            log.debug("", exc_info=True)


def record(
    model: Model, make: Callable[[], Target], largest: Largest, steps: Sequence[Step] | None = None
) -> Iterator[list[Launch]]:
    """What steps of `model`, which is on `meta` and still empty, will launch: a list a step, the first needed first. `make`
    puts a step around it, once it is filled. `steps`: instead of those that an engine will make."""
    from .kernels.triton.launch import recording

    thin(model)
    with recording():  # packing may launch too, and a launch without memory must never reach the device
        fill(model)
        target = make()
    for step in _steps(largest) if steps is None else steps:
        with recording() as launches:
            step(target)
        yield launches


def thin(model: Any) -> None:
    """Keep few layers of each kind, by the shapes of its weights: the others launch the same."""
    layers = getattr(model, "layers", None)
    if isinstance(layers, list):
        kinds = [tuple(slot.shape for slot in layer.weight_slots()) for layer in layers]
        model.layers = [layers[i] for i in shortened(kinds)]


def shortened(kinds: Sequence[Hashable]) -> list[int]:
    """Numbers of items to keep, as few as can be found, such that the same kinds begin, end and follow each other. What a layer
    launches depends on what the one in front left to it: a norm may be shared out between both."""

    def borders(kept: list[int]) -> set[tuple[Hashable | None, Hashable | None]]:
        return set(pairwise([None, *(kinds[i] for i in kept), None]))

    kept = list(range(len(kinds)))
    wanted = borders(kept)
    for length in range(len(kept) - 1, 0, -1):
        start = 0
        while start + length <= len(kept):
            shorter = kept[:start] + kept[start + length :]
            if borders(shorter) == wanted:
                kept = shorter
            else:
                start += 1
    return kept


def fill(model: Model) -> None:
    """Weights without memory, for a model on `meta`."""
    for slot in model.weight_slots():
        if not slot.unused and (not slot.optional or slot.drafts):
            slot.load(torch.empty(slot.shape, dtype=torch.bfloat16, device=META))
    model.finalize()


def _steps(largest: Largest) -> list[Step]:
    """A short prompt, one sequence; then all sizes, the largest prompt, a chunk far into one, what sampling needs."""
    plain, sampled = 0, Feature.SAMPLING
    filtered = sampled | Feature.FILTER
    most, drafts = largest.sequences, largest.drafts
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if size < most] + [most]
    steps = [_prefill([5], plain, largest), _decode(1, plain, 0)]
    steps += [_decode(1, features, 0) for features in (sampled, filtered)]
    steps += [_prefill([5], features, largest) for features in (sampled, filtered)]
    steps += [_decode(size, plain, count) for size in sizes for count in range(drafts + 1)]
    chunk = min(largest.prefill_tokens, largest.context - 1)
    prompts = [[n for n in lengths if n < largest.context] for lengths in ([33], [100, 7], [256, 256], [1024], [chunk])]
    steps += [_prefill(lengths, plain, largest) for lengths in prompts if lengths]
    steps += [_prefill([64], plain, largest, behind=min(FAR, largest.context - 65))] if largest.context > 65 else []
    return [*steps, _decode(most, EVERY_FEATURE, 0), _prefill([16] * min(most, 16), EVERY_FEATURE, largest)]


def _decode(batch: int, features: int, drafts: int) -> Step:
    from .step.decode import decode

    slots = torch.empty(batch, dtype=torch.int64, device=META)
    return lambda target: decode(slots, Drafting(drafts, drafts), features, target)


def _prefill(lengths: list[int], features: int, largest: Largest, behind: int = 0) -> Step:
    from .step.prefill import prefill

    chunks = [PrefillChunk(min(slot, largest.sequences - 1), behind, count, True) for slot, count in enumerate(lengths)]
    return lambda target: prefill(chunks, largest.drafts, features, target)


class Compiler:
    """Compiles launches for a device in several processes, each kind once, and loads what they compiled; leaving the `with`
    waits for all. One that fails is left to its first launch."""

    def __init__(self, device: torch.device, processes: int | None = None) -> None:
        from triton.runtime import driver

        from .kernels.triton.compilers import Compilers

        self._device = device
        self._use_device()
        self.count = 0
        """Kinds so far."""
        self.failed = 0
        """Kinds that were not compiled; from several threads, so good for no more than whether there are any."""
        self._launches: dict[tuple[Any, ...], Launch] = {}
        self._asked: list[Launch] = []
        self._loaders = ThreadPoolExecutor(LOADERS, "fluent-load-kernel")
        processes = processes or min(MOST_PROCESSES, os.cpu_count() or 1)
        self._compilers = Compilers(driver.active.get_current_target(), processes, self._done)

    def add(self, launches: Iterable[Launch]) -> None:
        for launch in launches:
            if self._launches.setdefault(key_of(launch), launch) is launch:
                self._asked.append(launch)
                self.count += 1
                self._compilers.compile(self.count - 1, launch)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._compilers.__exit__(*error)
        self._loaders.shutdown(wait=True, cancel_futures=error[0] is not None)

    def give_up(self) -> None:
        self._compilers.give_up()

    def _done(self, number: int, error: str) -> None:
        self._loaders.submit(self._load, self._asked[number], error)

    def _load(self, launch: Launch, error: str) -> None:
        """It lies in a file now; this puts it where its first launch looks first, ready to be launched: Triton 3.6 has a C
        compiler make what calls it."""
        from .kernels.triton.launch import compile_ahead

        if not error:
            try:
                self._use_device()
                compiled = compile_ahead(launch)
                if self._device.type == "cuda":
                    getattr(compiled, "run", None)  # a property of Triton's, that loads when it is asked for
                return
            except Exception as failed:
                error = f"{type(failed).__name__}: {failed}"
        self.failed += 1
        log.info("%s is compiled when it is launched: %s", launch.kernel.__name__, error)

    def _use_device(self) -> None:
        """Triton asks which one a thread uses."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)


def key_of(launch: Launch) -> tuple[Any, ...]:
    """Equal for launches that run the same machine code, as Triton specialises: types, constants, ones, multiples of 16."""
    from .kernels.cuda.launch import CudaKernel

    if isinstance(launch.kernel, CudaKernel):
        return (id(launch.kernel), launch.kernel.macros(launch.options))
    arguments = tuple(_key(value, parameter) for value, parameter in zip(launch.args, launch.kernel.params, strict=False))
    options = tuple(sorted((name, str(value)) for name, value in launch.options.items()))
    return (id(launch.kernel), arguments, options)


def _key(value: Any, parameter: Any) -> tuple[Any, ...]:
    specialised = not parameter.do_not_specialize
    if isinstance(value, torch.Tensor):
        return ("tensor", value.dtype, specialised and value.data_ptr() % 16 == 0)
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, int):
        return ("int", -(2**31) <= value < 2**31, *((value == 1, value % 16 == 0) if specialised else ()))
    if isinstance(value, float):
        return ("float",)
    if hasattr(value, "block_shape"):  # a tensor descriptor
        return ("descriptor", value.base.dtype, tuple(value.block_shape), str(getattr(value, "layout", "")))
    return ("other", str(value))
