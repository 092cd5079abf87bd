"""What the radix tree tells observers (`fluent_kv_events`): KV-aware routers learn from it which prefixes lie here.

A page is named by a chained hash: BLAKE2b with an 8-byte digest, read as a little-endian unsigned 64-bit number, over
the hash of the page before it (8 bytes little-endian, zeros at the start of a sequence) and the page's token ids (4 bytes
each, little-endian unsigned). It depends on nothing else: not on the process, the machine or the model. Hashing costs,
so a tree without a listener has no `KVEventLog` and computes none of this.
"""

from __future__ import annotations

import sys
from array import array
from hashlib import blake2b
from typing import TYPE_CHECKING

from ..types import KVEvent

if TYPE_CHECKING:
    from collections.abc import Iterable

TOKEN_BYTES = 4
_TYPECODE = "I" if array("I").itemsize == TOKEN_BYTES else "L"


def encode_tokens(tokens: Iterable[int]) -> bytes:
    """Token ids as 4-byte little-endian numbers. Raises `OverflowError` for ids outside 0 … 2³² - 1."""
    packed = array(_TYPECODE, tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def decode_tokens(data: bytes | bytearray) -> list[int]:
    """The inverse of `encode_tokens`."""
    packed = array(_TYPECODE, bytes(data))
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tolist()


def chain_hashes(parent: int | None, data: bytes | bytearray, page_bytes: int) -> list[int]:
    """Hashes of the whole pages in `data` (encoded tokens), `page_bytes` each, after the page with hash `parent`."""
    digest = (parent or 0).to_bytes(8, "little")
    hashes = []
    for start in range(0, len(data) - page_bytes + 1, page_bytes):
        digest = blake2b(digest + data[start : start + page_bytes], digest_size=8).digest()
        hashes.append(int.from_bytes(digest, "little"))
    return hashes


def page_hashes(tokens: Iterable[int], page_size: int, parent: int | None = None) -> list[int]:
    """Hashes of the whole pages of a sequence: what a router computes to look a prompt up."""
    return chain_hashes(parent, encode_tokens(tokens), page_size * TOKEN_BYTES)


class KVEventLog:
    """Collects events until the engine takes them, once a step."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._events: list[KVEvent] = []

    def stored(self, parent: int | None, hashes: list[int], data: bytes | bytearray) -> None:
        """Pages entered the tree, one after the other, below the page with hash `parent`."""
        self._events.append(
            KVEvent(kind="stored", blocks=hashes, parent=parent, tokens=decode_tokens(data), page_size=self.page_size)
        )

    def removed(self, hashes: list[int]) -> None:
        self._events.append(KVEvent(kind="removed", blocks=hashes))

    def cleared(self) -> None:
        self._events.append(KVEvent(kind="cleared"))

    def take(self) -> list[KVEvent]:
        """Everything since the last call, in order."""
        events, self._events = self._events, []
        return events
