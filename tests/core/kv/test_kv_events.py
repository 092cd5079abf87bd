"""Events of the prefix cache, and the documented hash that names a page."""

from hashlib import blake2b

import pytest
from kv_helpers import sequence

from fluentllm.core.kv.cache import KVCache
from fluentllm.core.kv.events import decode_tokens, encode_tokens, page_hashes
from fluentllm.core.types import KVEvent


def test_the_hash_of_a_page_is_what_the_documentation_says():
    tokens = [1, 2, 70_000, 4, 5, 6, 7]
    parent, expected = bytes(8), []
    for page in (tokens[:3], tokens[3:6]):
        parent = blake2b(parent + b"".join(t.to_bytes(4, "little") for t in page), digest_size=8).digest()
        expected.append(int.from_bytes(parent, "little"))
    assert page_hashes(tokens, 3) == expected
    assert page_hashes(tokens[3:], 3, expected[0]) == expected[1:]
    # Stable for ever: routers in other processes, of other versions, compute the same.
    assert page_hashes([0, 1, 2, 3], 4) == [5919486166599431679]


@pytest.mark.parametrize("tokens", [[], [1, 2]])
def test_less_than_a_page_has_no_hash(tokens: list[int]):
    assert page_hashes(tokens, 3) == []


def test_tokens_survive_packing():
    tokens = [0, 1, 255, 256, 2**32 - 1]
    assert decode_tokens(encode_tokens(tokens)) == tokens
    assert encode_tokens([258]) == b"\x02\x01\x00\x00"
    with pytest.raises(OverflowError):
        encode_tokens([-1])


def test_a_listener_hears_what_entered_and_what_left():
    cache = KVCache(3, 2, prefix_cache=True, listen=True)
    first = sequence([1, 2, 3, 4, 5])
    assert cache.admit(first, 5)
    cache.publish(first, 2)
    cache.publish(first, 5)
    one, two = page_hashes([1, 2, 3, 4], 2)
    assert cache.take_events() == [
        KVEvent(kind="stored", blocks=[one], tokens=[1, 2], page_size=2),
        KVEvent(kind="stored", blocks=[two], parent=one, tokens=[3, 4], page_size=2),
    ]
    assert cache.take_events() == []
    cache.release(first)
    assert cache.admit(sequence([7, 8, 9]), 3)
    assert cache.take_events() == [KVEvent(kind="removed", blocks=[two])]
    cache.clear()
    assert cache.take_events() == [KVEvent(kind="cleared")]


def test_without_a_listener_there_are_no_events():
    cache = KVCache(3, 2, prefix_cache=True)
    first = sequence([1, 2, 3])
    assert cache.admit(first, 3)
    cache.publish(first, 3)
    assert cache.pages_cached == 1
    assert cache.take_events() == []
