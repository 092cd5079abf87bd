"""Control frames: what is sealed opens once, on the other side, unchanged; nothing else opens."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

import fluentllm.transfer
from fluentllm.core.errors import ConfigError
from fluentllm.transfer.frames import MAX_FRAME, WINDOW, ControlSession, FrameError, FrameForged, FrameRepeated, ReplayWindow
from fluentllm.transfer.layout import KVLayout
from fluentllm.transfer.messages import (
    Attempt,
    Cancel,
    Describe,
    Drained,
    Failed,
    FirstToken,
    Group,
    Refuse,
    Release,
    Reserve,
)

KEY = b"a key of thirty-two bytes, no less"
OF = Attempt("handoff-1", 2, 2**63 - 1, 17)
LAYOUT = KVLayout(model="m", kind="mla", dtype="bfloat16", page_size=64, pages=9, layers=2, latent_dim=512, rope_dim=64)
MESSAGES = [
    Describe(engine="prefill-0", epoch=5, layout=LAYOUT, transport=b"\x00\xff"),
    Refuse(code="kv_layout_mismatch", reason="why", of=OF),
    Refuse(code="x", reason=""),
    Reserve(of=OF, prompt_tokens=100, prompt_hash=bytes(32), held_pages=1, pages=[3, 4], deadline=5.0),
    Group(OF, 0, 0, 2, 3, 4, 1, 4096, 2**32 - 1),
    FirstToken(of=OF, token=7, logprob=-0.5, rank=1, top=[(7, -0.5)]),
    Cancel(of=OF, reason="the client left"),
    Drained(of=OF),
    Release(of=OF),
    Failed(of=OF, code="x", reason="y"),
]


def numbered(number: int) -> Drained:
    """Messages that can be told apart."""
    return Drained(of=OF, groups=number)


def connected(key: bytes = KEY, other: bytes = KEY) -> tuple[ControlSession, ControlSession]:
    one, two = ControlSession(key), ControlSession(other)
    hello = one.hello()
    one.greet(two.hello())
    two.greet(hello)
    return one, two


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_what_is_sealed_opens_unchanged(message: object) -> None:
    one, two = connected()
    for sender, receiver in ((one, two), (two, one)):
        assert receiver.open(sender.seal(message)) == message


def test_a_frame_opens_once() -> None:
    one, two = connected()
    frames = [one.seal(numbered(number)) for number in range(5)]
    for frame in frames:
        two.open(frame)
    for frame in frames:
        with pytest.raises(FrameRepeated):
            two.open(frame)


def test_frames_may_come_in_another_order() -> None:
    one, two = connected()
    frames = [one.seal(numbered(number)) for number in range(WINDOW)]
    order = list(range(WINDOW))
    random.Random(1).shuffle(order)
    assert [two.open(frames[number]).groups for number in order] == order
    late = one.seal(numbered(0))
    for number in range(WINDOW):
        two.open(one.seal(numbered(number)))
    with pytest.raises(FrameRepeated):
        two.open(late)


def test_only_the_other_side_of_this_connection_is_believed() -> None:
    one, two = connected()
    third, _ = connected()
    frame = one.seal(Drained(of=OF))
    for who in (one, third):
        with pytest.raises(FrameForged):
            who.open(frame)
    assert two.open(frame) == Drained(of=OF)


def test_a_recorded_connection_cannot_be_played_back() -> None:
    """A restarted engine draws a new nonce, so frames that were recorded before do not verify."""
    recorded_side, victim = ControlSession(KEY), ControlSession(KEY)
    hello = recorded_side.hello()
    recorded_side.greet(victim.hello())
    victim.greet(hello)
    frame = recorded_side.seal(Cancel(of=OF))
    victim.open(frame)
    restarted = ControlSession(KEY)
    restarted.greet(hello)
    with pytest.raises(FrameForged):
        restarted.open(frame)


def test_hello_needs_the_key_and_comes_once() -> None:
    with pytest.raises(FrameForged, match="same key"):
        connected(other=b"another key of many bytes indeed")
    one = ControlSession(KEY)
    with pytest.raises(FrameForged):
        one.greet(one.hello())
    two = ControlSession(KEY)
    one.greet(two.hello())
    with pytest.raises(FrameRepeated):
        one.greet(two.hello())
    for wrong in (b"", two.hello()[:-1], two.hello() + b"x", b"\x02" + two.hello()[1:]):
        with pytest.raises(FrameError):
            ControlSession(KEY).greet(wrong)
    with pytest.raises(ConfigError, match="openssl rand"):
        ControlSession(b"short")


def test_nothing_is_sealed_or_opened_before_hello() -> None:
    silent = ControlSession(KEY)
    with pytest.raises(FrameError, match="hello"):
        silent.seal(numbered(1))
    one, _ = connected()
    with pytest.raises(FrameError, match="hello"):
        silent.open(one.seal(numbered(1)))


@given(data=st.binary(max_size=200))
def test_noise_does_not_open(data: bytes) -> None:
    _, two = connected()
    with pytest.raises(FrameError):
        two.open(data)
    with pytest.raises(FrameError):
        ControlSession(KEY).greet(data)


@given(message=st.sampled_from(MESSAGES), place=st.integers(0, 10**6), change=st.integers(1, 255), cut=st.integers(0, 40))
def test_a_changed_frame_does_not_open_and_changes_nothing(message: object, place: int, change: int, cut: int) -> None:
    one, two = connected()
    frame = one.seal(message)
    damaged = bytearray(frame)
    damaged[place % len(frame)] ^= change
    for wrong in (bytes(damaged), frame[:-cut] if cut else frame + b"\0", frame[cut + 1 :], b"x" + frame):
        with pytest.raises(FrameForged if len(wrong) > 60 else FrameError):
            two.open(wrong)
    assert two.open(frame) == message


class Sealed:
    """Anything at all in a frame that verifies: what a peer with the key, but with a bug, could send."""

    def __init__(self) -> None:
        self.one, self.two = connected()

    def open(self, body: bytes, kind: int = 2, version: int = 1, sequence: int = 1) -> object:
        from fluentllm.transfer import frames

        head = frames._HEAD.pack(version, kind, sequence)
        return self.two.open(head + body + frames._mac(self.one._out, head + body))


@given(body=st.binary(min_size=1, max_size=300), kind=st.integers(0, 4))
def test_noise_from_a_peer_with_the_key_is_an_error_of_ours(body: bytes, kind: int) -> None:
    with pytest.raises(FrameError):
        Sealed().open(body, kind)


json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=9) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=9), inner, max_size=6),
    max_leaves=20,
)


@given(fields=st.dictionaries(st.sampled_from(["of", "type", "epoch", "pages", "reason", "layout", "token"]), json))
def test_structured_noise_is_an_error_of_ours(fields: dict[str, object]) -> None:
    import msgspec

    try:
        body = msgspec.msgpack.encode(fields | {"type": "cancel"})
    except (OverflowError, UnicodeEncodeError):
        return
    with pytest.raises(FrameError):
        Sealed().open(body)


def test_a_deep_body_is_an_error_of_ours() -> None:
    with pytest.raises(FrameError):
        Sealed().open(b"\x91" * 100_000)
    with pytest.raises(FrameError):
        Sealed().open(b"\x81\xa2of" + b"\x91" * 500_000)


@pytest.mark.parametrize(
    "message",
    [
        numbered(-1),
        Cancel(of=Attempt("", 0, 0, 0)),
        Cancel(of=Attempt("x" * 129, 0, 0, 0)),
        Cancel(of=OF, reason="x" * 5000),
        Reserve(of=OF, prompt_tokens=1, prompt_hash=b"", held_pages=0, pages=[0], deadline=1),
        Reserve(of=OF, prompt_tokens=1, prompt_hash=b"", held_pages=0, pages=[1], deadline=1e9),
        Group(OF, 0, 0, 0, 0, 5000),
        Group(OF, 2**20, 0, 0, 0, 0),
    ],
)
def test_bounds_hold_on_receipt(message: object) -> None:
    one, two = connected()
    frame = one.seal(message)
    with pytest.raises(FrameError, match="no message"):
        two.open(frame)


def test_large_frames_are_refused_on_both_sides() -> None:
    one, two = connected()
    big = Reserve(of=OF, prompt_tokens=1, prompt_hash=b"", held_pages=0, pages=[2**30] * 300_000, deadline=1)
    with pytest.raises(FrameError, match="the most is"):
        one.seal(big)
    with pytest.raises(FrameError):
        two.open(bytes(MAX_FRAME + 1))
    most = Reserve(of=OF, prompt_tokens=1, prompt_hash=b"", held_pages=0, pages=[2**30] * 2**17, deadline=1)
    assert two.open(one.seal(most)) == most


def test_the_window_against_a_plain_set() -> None:
    rng = random.Random(0)
    window, seen, newest = ReplayWindow(), set(), 0
    for _ in range(20_000):
        sequence = max(0, newest + rng.choice([1, 2, -1, -5, -WINDOW, 1 - WINDOW, rng.randint(-2000, 50)]))
        fresh = sequence >= 1 and sequence not in seen and newest - sequence < WINDOW
        try:
            window.check(sequence)
        except FrameRepeated:
            assert not fresh, sequence
            continue
        assert fresh, sequence
        window.add(sequence)
        seen.add(sequence)
        newest = max(newest, sequence)
    assert window.newest == newest


def test_nothing_here_pickles() -> None:
    folder = Path(fluentllm.transfer.__file__).parent
    plugins = folder.parent / "plugins"
    files = itertools.chain(folder.rglob("*.py"), *(plugins.glob(f"kv_{name}/*.py") for name in ("nixl", "mooncake")))
    words = ("import pickle", "marshal", "eval(", "exec(", "get_serialized_descs", "torch.load")
    assert [(path.name, word) for path in files for word in words if word in path.read_text(encoding="utf-8")] == []
