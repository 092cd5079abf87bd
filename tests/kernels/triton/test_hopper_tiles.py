"""Which tile a product of few rows takes on Hopper: by rule, for any shape."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from fluentllm.kernels.cuda.linear_cluster import ClusterTile
from fluentllm.kernels.triton.hopper_tiles import MOST_TOKENS, HopperTile, fits, rule

PROCESSORS = 132


@given(
    tokens=st.integers(1, 64),
    rows=st.integers(1, 200_000),
    depth=st.integers(16, 20_000),
    width=st.sampled_from([1, 2]),
    gated=st.booleans(),
)
def test_any_shape_fits_and_runs_at_once(tokens: int, rows: int, depth: int, width: int, gated: bool) -> None:
    tile = rule(tokens, rows, depth, width, gated, PROCESSORS)
    if tile is None:
        # Too many tokens, or too many scales of a program: 4,096, padded to a power of two.
        together, wide = -(-rows // (64 * 2 * PROCESSORS)), max(8, 2 * tokens)
        many = width == 1 and together * wide * (depth // 128 + 4) * (4 if gated else 2) > 4096
        assert tokens > MOST_TOKENS[width] or many
        return
    assert tile.tokens in (8, 16, 32, 64)
    assert tokens <= tile.tokens < max(16, 2 * tokens)
    tiles = -(-rows // 64)
    if isinstance(tile, HopperTile):
        assert fits(tile, depth, width, gated)
        assert -(-tiles // tile.together) <= 2 * PROCESSORS
        return
    assert 2 <= tile.splits <= 8
    assert tiles * tile.splits <= 1.5 * PROCESSORS
    assert tile.fits(tokens, depth, width, gated)
    assert tile.stages(tokens, depth, width, gated) >= 1
    assert tile.shared_bytes(tokens, depth, width, gated) <= 113 * 1024
    # All tokens are finished by somebody.
    assert tile.splits * 2 * tile.each(tokens) >= tokens


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((8, 2048, 6144, 1, False), ClusterTile(8, 6)),  # 12.6 MB: 192 programs
        ((64, 4096, 4096, 1, False), ClusterTile(64, 3)),
        ((32, 2048, 2048, 2, False), ClusterTile(32, 4)),  # more tokens, fewer parts to add up
        ((32, 1408, 2048, 2, True), None),
        ((8, 3072, 1536, 1, False), HopperTile(8, 4)),  # 48 whole tiles of 98 KB
        ((8, 10944, 2048, 1, True), HopperTile(8, 2)),  # 171 whole tiles
        ((8, 151936, 1024, 2, False), HopperTile(8, 4, 9)),
        ((8, 2048, 2048, 4, False), None),
        ((0, 2048, 2048, 2, False), None),
    ],
)
def test_measured_shapes(shape: tuple[int, int, int, int, bool], expected: HopperTile | ClusterTile | None) -> None:
    assert rule(*shape, PROCESSORS) == expected
