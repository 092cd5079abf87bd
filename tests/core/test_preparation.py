"""What an idle engine captures, in which order, and that whoever comes is seen first."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future

from fluentllm.core import preparation
from fluentllm.core.buckets import bucket_of
from fluentllm.core.preparation import Preparation, Program
from fluentllm.core.types import Drafting, StepPlan

PLAIN, THREE = Drafting(), Drafting(3, 3)


class Device:
    """Runs programs, each of which is ready after two runs."""

    def __init__(self) -> None:
        self.ran: list[Program] = []
        self.error: Exception | None = None

    def prepare(self, program: Program) -> Future[bool]:
        future: Future[bool] = Future()
        self.ran.append(program)
        if self.error is not None:
            future.set_exception(self.error)
        else:
            future.set_result(self.ran.count(program) == 2)
        return future


def step(features: int, batch: int = 1) -> StepPlan:
    return StepPlan(step=0, decode=list(range(batch)), features=features)


async def test_small_batches_of_the_usual_requests_first() -> None:
    device = Device()
    wanted = Preparation(device.prepare, 5, [PLAIN, THREE])
    await wanted.all(5)
    assert not device.ran, "nothing is known of the requests"
    for features in (8, 1, 1):
        wanted.saw(step(features))
    await wanted.all(2)
    order = [(features, bucket, drafting) for features in (1, 8) for bucket in (1, 2) for drafting in (PLAIN, THREE)]
    assert device.ran == [Program(bucket, drafting, features) for features, bucket, drafting in order for _ in range(2)]
    device.ran.clear()
    await wanted.all(100)
    assert {program.bucket for program in device.ran} == {4, 8}, "5 run as 8"


async def test_the_batches_that_most_steps_had_come_before_others() -> None:
    device = Device()
    wanted = Preparation(device.prepare, 32, [PLAIN, THREE])
    for features, batch, steps in ((0, 16, 3), (0, 5, 2), (0, 7, 2), (0, 1, 1), (4, 32, 5)):
        for _ in range(steps):
            wanted.saw(step(features, batch))
    await wanted.all(32)
    seen = [(program.features, program.bucket) for program in device.ran[::2] if program.drafting == PLAIN]
    buckets = sorted({bucket_of(batch) for batch in range(1, 33)})
    orders = {0: [8, 16, 1], 4: [32]}  # 5 and 7 run as 8
    assert seen == [(features, n) for features, first in orders.items() for n in first + [n for n in buckets if n not in first]]


async def test_prompts_are_no_reason_to_capture() -> None:
    device = Device()
    wanted = Preparation(device.prepare, 1, [PLAIN])
    wanted.saw(step(1, batch=0))
    assert wanted.next() is None


async def test_there_is_an_end_to_it() -> None:
    device = Device()
    wanted = Preparation(device.prepare, 256, [Drafting(k, k) for k in range(8)])
    wanted.saw(step(0))
    await wanted.all(256)
    assert len(set(device.ran)) == preparation.MOST


async def test_whoever_comes_is_seen_first() -> None:
    device, wake = Device(), asyncio.Event()
    wanted = Preparation(device.prepare, 64, [PLAIN])
    wanted.saw(step(0))
    wake.set()
    await wanted.until(wake)
    assert not device.ran
    wake.clear()
    asyncio.get_running_loop().call_later(preparation.REST + 3.5 * preparation.BREATH, wake.set)
    await wanted.until(wake)
    assert 1 <= len(device.ran) <= 4, "it waits before each, and not for the rest"


async def test_a_failure_ends_it() -> None:
    device, wake = Device(), asyncio.Event()
    device.error = MemoryError("the device is full")
    wanted = Preparation(device.prepare, 64, [PLAIN])
    wanted.saw(step(0))
    await wanted.all(64)
    await asyncio.wait_for(wanted.until(wake), 10)
    assert len(device.ran) == 1
