"""How the GPU's tests count what a step asks of CUDA, tried without one: calls are ranges with their names."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest
from gpu.watching import STEP, _read, waits
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, record_function


def call(name: str) -> None:
    with record_function(name):
        time.sleep(0.001)


def test_calls_of_the_launch_thread_count_and_no_others() -> None:
    """While a step launches, another thread waits for the step before it: that is what it is for."""
    inside, outside = threading.Event(), threading.Event()

    def reader() -> None:
        inside.wait()
        call("cudaEventSynchronize")
        outside.set()

    every_thread = _ExperimentalConfig(profile_all_threads=True)
    with profile(activities=[ProfilerActivity.CPU], experimental_config=every_thread) as profiler:
        other = threading.Thread(target=reader)
        other.start()
        call("cudaStreamSynchronize")  # before the first step
        for number in range(3):
            with record_function(STEP):
                call("cudaGraphLaunch")
                if number == 1:
                    inside.set()
                    outside.wait()
                    call("cudaMemcpyAsync")
            call("cudaEventRecord" if number < 2 else "cudaDeviceSynchronize")
        other.join()
    assert "cudaEventSynchronize" in {event.name for event in profiler.events()}
    seen = _read(profiler)
    launch = Counter(cudaGraphLaunch=1)
    assert seen.calls == [launch, launch + Counter(cudaMemcpyAsync=1), launch]
    assert seen.between == Counter(cudaEventRecord=2)
    assert seen.waiting() == {}


@pytest.mark.parametrize("place", ["in a step", "between steps"])
def test_what_waits_is_found(place: str) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(2):
            with record_function(STEP):
                call("cudaGraphLaunch")
                if place == "in a step":
                    call("cudaEventSynchronize")
            if place == "between steps":
                call("cudaEventSynchronize")
    assert _read(profiler).waiting() == {"cudaEventSynchronize": 2 if place == "in a step" else 1}


@pytest.mark.parametrize(
    "name",
    [
        "cudaEventSynchronize", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cuEventSynchronize", "cuCtxSynchronize",
        "cuStreamSynchronize_ptsz", "cudaMemcpy", "cudaMemcpy2D", "cudaMemcpyToSymbol", "cuMemcpyDtoH_v2", "cudaMalloc",
        "cudaMallocHost", "cudaHostAlloc", "cudaFree", "cudaFreeHost", "cuMemAlloc_v2", "cuMemFree_v2", "cuMemHostAlloc",
        "cudaHostRegister",
    ],
)  # fmt: skip
def test_calls_that_wait(name: str) -> None:
    assert waits(name)


@pytest.mark.parametrize(
    "name",
    [
        "cudaMemcpyAsync", "cuMemcpyHtoDAsync_v2", "cudaMemsetAsync", "cudaMallocAsync", "cudaFreeAsync", "cudaGraphLaunch",
        "cudaEventRecord", "cudaEventQuery", "cudaStreamWaitEvent", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaMemGetInfo",
        "cudaStreamIsCapturing", "cudaEventCreateWithFlags", "cudaHostGetDevicePointer",
    ],
)  # fmt: skip
def test_calls_that_do_not(name: str) -> None:
    assert not waits(name)
