"""Writes as rows: offsets to addresses, and cutting into chunks, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from fluentllm.core.transport import WriteRefused
from fluentllm.transfer.rows import FEW, AddressMap, addressed, check_rows, cut
from fluentllm.transfer.wire import Region

REGIONS = [Region(1000, 10, 0), Region(50, 0, 0), Region(2**63 + 8, 7, 0), Region(5000, 3, 0)]


@given(offset=st.integers(-3, 23), length=st.integers(1, 12))
def test_offsets_to_addresses(offset: int, length: int) -> None:
    plain = [region.address + byte for region in REGIONS for byte in range(region.size)]
    owner = [index for index, region in enumerate(REGIONS) for _ in range(region.size)]
    inside = offset >= 0 and offset + length <= 20 and owner[offset] == owner[offset + length - 1]
    arguments = np.array([offset]), np.array([length])
    if inside:
        assert AddressMap(REGIONS).addresses(*arguments, "x").tolist() == [plain[offset]]
    else:
        with pytest.raises(WriteRefused, match="x registered"):
            AddressMap(REGIONS).addresses(*arguments, "x")


@given(rows=st.lists(st.tuples(st.integers(-1, 21), st.integers(-1, 21), st.integers(-1, 8)), max_size=FEW))
def test_few_rows_come_out_as_many(rows: list[tuple[int, int, int]]) -> None:
    """The same addresses, or the same error, one by one and as arrays: many are few and then valid ones."""
    here, there = AddressMap(REGIONS), AddressMap(REGIONS[::-1])
    valid = [(0, 0, 1)] * (FEW + 1)

    def outcome(rows: list[tuple[int, int, int]]) -> tuple[list[list[int]], int] | str:
        try:
            found, size = addressed(np.array(rows, dtype=np.int64).reshape(-1, 3), here, there, ("x", "y"))
        except WriteRefused as error:
            return str(error)
        assert found.dtype == np.uint64
        return found.tolist(), size

    few, many, rest = outcome(rows), outcome(rows + valid), outcome(valid)
    if isinstance(few, str):
        assert few == many
    else:
        assert not isinstance(rest, str)
        assert (few[0] + rest[0], few[1] + rest[1]) == many


def test_nothing_registered_nothing_allowed() -> None:
    with pytest.raises(WriteRefused):
        AddressMap([]).addresses(np.array([0]), np.array([1]), "x")
    assert AddressMap([]).addresses(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), "x").tolist() == []


@given(
    rows=st.lists(st.tuples(st.integers(0, 2**62), st.integers(2**62, 2**63), st.integers(1, 60)), max_size=30),
    chunk_bytes=st.integers(1, 70),
    chunk_rows=st.integers(1, 8),
)
def test_chunks_write_the_same_in_bounds(rows: list[tuple[int, int, int]], chunk_bytes: int, chunk_rows: int) -> None:
    chunks = cut(np.array(rows, dtype=np.uint64).reshape(-1, 3), chunk_bytes, chunk_rows)
    pieces = [row for chunk in chunks for row in chunk.tolist()]
    assert all(len(chunk) <= chunk_rows and chunk[:, 2].sum() <= chunk_bytes and len(chunk) for chunk in chunks)
    found = [(a + i, b + i) for a, b, length in pieces for i in range(length)]
    assert found == [(a + i, b + i) for a, b, length in rows for i in range(length)]


def test_a_terabyte_is_cut_at_once() -> None:
    chunks = cut(np.array([[0, 2**40, 2**40]], dtype=np.uint64), 2**24, 1024)
    assert len(chunks) == 2**16
    assert chunks[-1].tolist() == [[2**40 - 2**24, 2**41 - 2**24, 2**24]]


@pytest.mark.parametrize("wrong", [[[1, 2]], [1, 2, 3], [[1.0, 2.0, 3.0]], [[0, 0, -1]]])
def test_what_is_no_write_is_refused(wrong: list) -> None:
    with pytest.raises(WriteRefused):
        check_rows(np.array(wrong))
    with pytest.raises(WriteRefused, match="above"):
        check_rows(np.array([[2**63, 0, 1]], dtype=np.uint64))


def test_rows_of_no_length_are_left_out() -> None:
    assert check_rows(np.array([[5, 6, 0], [1, 2, 3], [7, 8, 0]])).tolist() == [[1, 2, 3]]
    assert check_rows([]).shape == (0, 3)
