"""What a launch costs the host: eager calls of the room's launchers, timed while the device has nothing to wait for, and where
that time goes.

    python benchmarks/kernels/launch_cost.py --json FILE

Rows {call, launches, us, triton_us}: microseconds of host time a call, as the room launches (`relaunch.py`) and as Triton
itself does (`kernel[grid](…)`), medians of rounds in which the device lags behind as little as it can (tiny shapes). Prefill
launches hundreds of kernels a pass, so this bounds the time to the first token of small models. `--profile CALL` prints
Python's own profile of one of the calls.
"""

from __future__ import annotations

import argparse
import cProfile
import ctypes
import json
import pstats
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F

from fluentllm.kernels.moe import Routing
from fluentllm.kernels.triton import launch as door
from fluentllm.kernels.triton.elementwise import silu_mul
from fluentllm.kernels.triton.launch import descriptor, recording
from fluentllm.kernels.triton.linear import linear, new_counters
from fluentllm.kernels.triton.linear_tiles import LinearTile
from fluentllm.kernels.triton.moe import experts
from fluentllm.kernels.triton.moe_route import route
from fluentllm.kernels.triton.norm import add_rms_norm, rms_norm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EACH = 200
ROUNDS = 9


def calls() -> dict[str, Callable[[], object]]:
    """Few rows: the device is done before the host asks for more."""
    dtype, device = torch.bfloat16, torch.device("cuda")
    x, weight, norm = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((4, 512), (512, 512), (512,)))
    gate_up, down = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((8, 256, 512), (8, 512, 128)))
    logits, routing = torch.randn(4, 8, device=device), Routing(8, 2)
    weights, ids = route(logits, routing)
    counters = new_counters(512, device)
    with_tma, without = (LinearTile(8, 64, 128, 1, 3, tma=tma) for tma in (True, False))
    driver, answer = ctypes.CDLL("libcuda.so.1"), ctypes.c_uint64()
    into, pointer = ctypes.byref(answer), ctypes.c_uint64(x.data_ptr())
    return {
        "driver, version": lambda: driver.cuDriverGetVersion(into),
        # What Triton's launcher asks of each tensor: CU_POINTER_ATTRIBUTE_DEVICE_POINTER is 3.
        "driver, pointer": lambda: driver.cuPointerGetAttribute(into, 3, pointer),
        "torch.empty": lambda: torch.empty(4, 512, device=device, dtype=dtype),
        "torch add_": lambda: x.add_(0.0),
        "torch linear": lambda: F.linear(x, weight),
        "descriptor": lambda: descriptor(weight, 64, 128),
        "silu_mul": lambda: silu_mul(x),
        "rms_norm": lambda: rms_norm(x, norm, 1e-5),
        "add_rms_norm": lambda: add_rms_norm(x, x, norm, 1e-5),
        "linear, TMA": lambda: linear(x, weight, counters=counters, tile=with_tma),
        "linear, no TMA": lambda: linear(x, weight, counters=counters, tile=without),
        "route": lambda: route(logits, routing),
        "experts": lambda: experts(x, weights, ids, gate_up, down),
    }


@contextmanager
def by_triton() -> Iterator[None]:
    """Inside, Triton makes the launches."""
    before = door.relaunch
    door.relaunch = lambda kernel, grid, args, options: kernel[grid](*args, **options)
    try:
        yield
    finally:
        door.relaunch = before


def cost(call: Callable[[], object]) -> float:
    """Microseconds of host time a call."""
    found = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(EACH):
            call()
        found.append((time.perf_counter() - started) / EACH * 1e6)
    torch.cuda.synchronize()
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", help="a call's name")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU")
    made = calls()
    if args.profile is not None and args.profile not in made:
        parser.error(f"there is no call {args.profile!r}: {list(made)}")
    rows = []
    for name, call in made.items():
        with recording(run=True) as launches:
            call()
        row = {"call": name, "launches": len(launches), "us": cost(call)}
        if launches:
            with by_triton():
                call()
                row["triton_us"] = cost(call)
        rows.append(row)
        own = f"{row['triton_us']:10.1f} us by Triton" if launches else ""
        print(f"{name:20}{len(launches):4} launches{row['us']:10.1f} us{own}", flush=True)
    if args.profile is not None:
        profile = cProfile.Profile()
        profile.enable()
        for _ in range(EACH):
            made[args.profile]()
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    if args.json is not None:
        args.json.write_text(
            json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
