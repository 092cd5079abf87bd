"""Checksums speak of contents: the same on both ends, whatever the pages' numbers, and another for any byte that differs."""

from __future__ import annotations

import torch

from fluentllm.transfer.layout import KVLayout
from fluentllm.transfer.memory import RegisteredMemory

LAYOUT = KVLayout(
    model="m", kind="gqa", dtype="float32", page_size=4, pages=9, layers=3, heads=2, head_dim=3, v_head_dim=2, page_states=(8,)
)


def random_memory() -> list[torch.Tensor]:
    k, v = torch.rand(3, 9, 4, 2, 3), torch.rand(3, 9, 4, 2, 2)
    return [k, v, torch.rand(9, 2)]


def test_the_same_contents_in_other_pages() -> None:
    ours, theirs = random_memory(), random_memory()
    source, target = [5, 2, 7], [1, 8, 3]
    for tokens in (4, 3, 1):
        for mine, other in zip(ours[:2], theirs[:2], strict=True):
            other[:, target[:2]] = mine[:, source[:2]]
            other[:, target[2], :tokens] = mine[:, source[2], :tokens]
        theirs[2][target] = ours[2][source]
        a, b = RegisteredMemory(LAYOUT, ours), RegisteredMemory(LAYOUT, theirs)
        for layers in (range(3), range(1, 2)):
            assert a.checksum(source, layers, tokens, True) == b.checksum(target, layers, tokens, True)
        if tokens < 4:  # what lies behind the prompt does not count
            theirs[0][:, target[2], tokens:] += 1
            assert a.checksum(source, range(3), tokens, True) == b.checksum(target, range(3), tokens, True)
        assert a.checksum(source, range(3), tokens, False) != a.checksum(source, range(3), tokens, True)


def test_any_byte_counts() -> None:
    memory = random_memory()
    pages, view = [2, 6], RegisteredMemory(LAYOUT, memory)
    before = view.checksum(pages, range(3), 2, True)
    for tensor, place in ((memory[0], (2, 6, 1, 1, 2)), (memory[1], (0, 2, 3, 0, 0)), (memory[2], (6, 1))):
        old = tensor[place].clone()
        tensor[place] += 1
        assert view.checksum(pages, range(3), 2, True) != before
        tensor[place] = old
    assert view.checksum(pages, range(3), 2, True) == before


def test_pages_of_planes() -> None:
    """The last page counts as far as its tokens go, in each of the planes."""
    layout = KVLayout(
        model="m", kind="mla", dtype="float8_e4m3fn", page_size=16, pages=5, layers=2, latent_dim=24, rope_dim=8
    )  # fmt: skip
    ours, theirs = (torch.randint(0, 256, (2, 5, 16, 44), dtype=torch.uint8) for _ in range(2))
    theirs[:, [1, 4]] = ours[:, [3, 2]]
    a, b = RegisteredMemory(layout, [ours]), RegisteredMemory(layout, [theirs])
    for tokens in (1, 7, 15):
        flat = theirs.view(2, 5, -1)[0, 4]
        expected = a.checksum([3, 2], range(2), tokens, False)
        assert b.checksum([1, 4], range(2), tokens, False) == expected
        for start, width in ((0, 24), (16 * 24, 4), (16 * 28, 16)):
            for byte, counts in ((start, True), (start + tokens * width - 1, True), (start + tokens * width, False)):
                flat[byte] ^= 1
                assert (b.checksum([1, 4], range(2), tokens, False) != expected) == counts
                flat[byte] ^= 1
