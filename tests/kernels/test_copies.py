"""Matrices that are packed twice: right before the copy is there, and right after."""

from __future__ import annotations

import threading

import pytest
import torch

from fluentllm.kernels import weights
from fluentllm.kernels.copies import COPIES, Copies


@pytest.mark.parametrize("precision", ["int4", "int8"])
@pytest.mark.parametrize("rows", [0, 1, 3, 40])
def test_products_before_and_after_the_copy(precision: str, rows: int) -> None:
    matrix = torch.randn(48, 64)
    packed = weights.pack(matrix, precision, twice=True)
    x = torch.randn(rows, 64)
    before = packed.product(x, None)
    COPIES.wait()
    if isinstance(packed, weights.TwoWeights):
        assert packed.many is not None
    expected = x @ packed.dequantised().T
    for found in (before, packed.product(x, None)):
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03 * 8)


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_blocks_of_eight_bits_keep_float32_sums(monkeypatch: pytest.MonkeyPatch, vnni: bool, rows: int) -> None:
    """A head's logits must not tie for want of bits: bfloat16 ones around 16 are an eighth apart."""
    if vnni and not weights.has_vnni():
        pytest.skip("this CPU has no VNNI")
    monkeypatch.setattr(weights, "has_vnni", lambda: vnni)
    q = torch.randint(-127, 128, (64, 96), dtype=torch.int8)
    parts = {"q": q, "d": torch.rand(64, 3) * 0.01}
    packed = weights.pack_blocks("q8_0", parts, "packed", twice=True)
    assert packed is not None
    x = torch.randn(rows, 96) * 3
    COPIES.wait()
    found = packed.product(x, None)
    torch.testing.assert_close(found, x @ packed.dequantised().T, rtol=2e-3, atol=2e-3 * float(found.abs().max()))
    assert not torch.equal(found, found.bfloat16().float())


def test_copies_are_made_in_order_and_the_thread_ends() -> None:
    copies = Copies()
    done: list[int] = []
    first = threading.Event()
    copies.add(first.wait)
    for number in range(5):
        copies.add(lambda number=number: done.append(number))
    assert done == []
    first.set()
    copies.wait()
    assert done == [0, 1, 2, 3, 4]
    copies.add(lambda: done.append(5))
    copies.wait()
    assert done[-1] == 5
    assert not any(thread.name == "fluent-copies" for thread in threading.enumerate())


def test_the_thread_is_no_daemon_though_one_asked() -> None:
    """Threads inherit it, and a daemon that is in torch when the interpreter ends aborts the process."""
    copies = Copies()
    release = threading.Event()
    asking = threading.Thread(target=copies.add, args=(release.wait,), daemon=True)
    asking.start()
    asking.join()
    [thread] = [thread for thread in threading.enumerate() if thread.name == "fluent-copies"]
    assert not thread.daemon
    release.set()
    copies.wait()
