"""Steps bring nothing from the host while they are launched: on a GPU that would wait for the device. Looked for on tensors
without memory, so on any machine; reading them, which waits too, fails there by itself."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_prewarm import recorded, small
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fluentllm import prewarm

Step = Callable[[Any], None]
ATEN = torch.ops.aten
PUTS = {ATEN.index_put_.default, ATEN.index_put.default, ATEN._index_put_impl_.default}


class FromHost(TorchDispatchMode):
    """Notes operations on the device that take tensors of the host, other than copies that do not wait. A single number goes
    along with a kernel's arguments, but for `tensor[indices] = number`: on a GPU torch keeps it on the host until it is put."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode they come whole
                return func.decompose(*args, **kwargs)
        if self._waits(func, args, kwargs):
            self.found.append(f"{func}\n{''.join(traceback.format_stack(limit=12)[:-1])}")
        return func(*args, **kwargs)

    @staticmethod
    def _waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func in PUTS:
            return args[0].device.type == "meta" and args[2].dim() == 0
        host = [tensor for tensor in tensors if tensor.device.type == "cpu"]
        if func is ATEN._to_copy.default:
            return bool(host) and str(kwargs.get("device")) == "meta" and not kwargs.get("non_blocking")
        if not host or len(host) == len(tensors):
            return False
        if func is ATEN.copy_.default:
            return args[2:3] != (True,) and not kwargs.get("non_blocking")
        return any(tensor.dim() for tensor in host)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("qwen3-0.6b", "none"),
        ("qwen3-0.6b", "pld"),
        ("deepseek-v3-lite", "none"),
        ("deepseek-v3-lite", "mtp"),
        ("longcat-flash-lite", "mtp"),
    ],
)
def test_steps_bring_nothing_from_the_host(name: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mode, steps_of = FromHost(), prewarm._steps
    steps = 0

    def watched(step: Step) -> Step:
        def run(target: Any) -> None:
            nonlocal steps
            steps += 1
            with mode:
                step(target)

        return run

    def every(*given: Any) -> Iterator[Step]:
        return map(watched, steps_of(*given))

    monkeypatch.setattr(prewarm, "_steps", every)
    folder = small(tmp_path / name, name, num_nextn_predict_layers=1)
    recorded(folder, monkeypatch, **{"speculative.method": method, "speculative.k": 3})
    assert steps
    assert not mode.found, "\n".join(mode.found)


@pytest.mark.parametrize(
    ("write", "waits"),
    [
        (lambda ones, at: ones.index_fill_(0, at, 3.0), False),
        (lambda ones, at: ones.mul_(torch.tensor(3.0)), False),
        (lambda ones, at: torch.arange(4.0).to(ones.device, non_blocking=True), False),
        (lambda ones, at: ones.__setitem__(at, 3.0), True),
        (lambda ones, at: ones.mul_(torch.arange(4.0)), True),
        (lambda ones, at: torch.arange(4.0).to(ones.device), True),
        (lambda ones, at: ones.copy_(torch.arange(4.0)), True),
    ],
)
def test_what_waits_is_found(write: Callable[[torch.Tensor, torch.Tensor], Sequence[Any] | None], waits: bool) -> None:
    ones, at = torch.ones(4, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    mode = FromHost()
    try:
        with mode:
            write(ones, at)
    except RuntimeError:
        pass  # the host's tensor cannot meet one without memory
    assert bool(mode.found) == waits
