"""Behind MLA's decode: splits merged, in one launch with the product or before it, against the plain merge and product."""

from __future__ import annotations

import pytest
import torch
from mla_splits import decoded

from fluentllm.kernels.mla_decode import expand
from fluentllm.kernels.mla_decode.combine import combine_splits
from fluentllm.kernels.mla_decode.expand import ALL, expand_tile, merge_and_expand, shares
from fluentllm.kernels.mla_decode.plan import new_plan
from fluentllm.kernels.mla_decode.replay import combine_reference
from fluentllm.kernels.triton.launch import launch

CASES = [
    # (lengths, parts, heads, query length, value rows)
    ([1024], 66, 16, 1, 128),
    ([0, 64, 900, 0, 130], 9, 20, 1, 24),
    ([1500, 3], 20, 4, 4, 40),
    ([64] * 9, 4, 3, 2, 16),
    ([5, 0, 256], 5, 64, 1, 16),
    ([0, 0], 5, 2, 1, 16),
]


@pytest.mark.parametrize(("lengths", "parts", "heads", "queries", "value"), CASES)
@pytest.mark.parametrize("most", [ALL, 1, 3])
def test_merge_and_expand(
    lengths: list[int], parts: int, heads: int, queries: int, value: int, most: int, device: torch.device, rng: torch.Generator
) -> None:
    rows, count = heads * queries, len(lengths)
    planned = new_plan(torch.tensor(lengths, dtype=torch.int32), parts)
    left = decoded(planned, rows, rng)
    merged = left[0].clone()
    combine_reference(planned, merged, *left[1:])
    up_v = torch.randn(heads, value, 512, generator=rng) * 0.1
    by_token = merged.view(count, queries, heads, 512).flatten(0, 1)
    expected = torch.einsum("thc,hvc->thv", by_token.double(), up_v.double())

    plan = new_plan(planned.lengths.to(device), parts)
    out, partial, lse = (t.to(device) for t in left)
    if most != ALL:
        launch(
            combine_splits, (rows, 2, count), out, partial, lse, plan.spans,
            ROWS=rows, EACH=1, COLUMNS=256, SPLITS=4, MOST=most, PDL=0,
        )  # fmt: skip
    latent = out.view(count, queries, heads, 512)
    values = merge_and_expand(latent, partial, lse, plan, up_v.to(device), most)
    # 512 products of 0.06 in the mean: float32 loses a few 1e-6 of them whatever they come to.
    torch.testing.assert_close(values.cpu().double(), expected, rtol=1e-4, atol=2e-4)


def test_every_size_that_a_pass_may_have(device: torch.device, rng: torch.Generator) -> None:
    """Tiles of one, a few and many tokens, and the last of them not full."""
    for sequences, queries, heads in ((1, 1, 2), (2, 1, 3), (3, 1, 2), (5, 2, 2), (11, 3, 2), (9, 7, 2)):
        planned = new_plan(torch.randint(0, 300, (sequences,), generator=rng).to(torch.int32), 17)
        left = decoded(planned, heads * queries, rng)
        merged = left[0].clone()
        combine_reference(planned, merged, *left[1:])
        up_v = torch.randn(heads, 48, 512, generator=rng) * 0.1
        by_token = merged.view(sequences * queries, heads, 512)
        expected = torch.einsum("thc,hvc->thv", by_token.double(), up_v.double())
        plan = new_plan(planned.lengths.to(device), 17)
        for most, given in ((ALL, left[0]), (1, merged)):
            latent = given.view(sequences, queries, heads, 512).to(device)
            values = merge_and_expand(latent, left[1].to(device), left[2].to(device), plan, up_v.to(device), most)
            torch.testing.assert_close(values.cpu().double(), expected, rtol=1e-4, atol=2e-4)


def test_who_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shares(1, 8).most == ALL
    assert not shares(1, 8).combines
    assert 1 < shares(1, 132).most < 16  # a context of 1,024 is merged before
    assert shares(8, 132).most == 1
    assert shares(32, 132).most == 1
    assert shares(64, 1).most == ALL  # nothing to merge
    monkeypatch.setattr(expand, "MERGE_INSIDE", False)
    assert shares(1, 16).most == 1
    monkeypatch.setattr(expand, "MERGE_INSIDE", True)
    assert shares(64, 132).most == ALL


def test_tiles_fill_the_chip_and_fit() -> None:
    for heads in (1, 8, 16, 20, 32, 64, 128):
        for tokens in range(1, 65):
            for largest in (8, 64):
                rows, together = expand_tile(tokens, heads, 128, largest)
                assert together <= largest
                assert together < 2 * tokens
                programs = -(-tokens // together) * heads * -(-128 // rows)
                assert programs >= min(64, 4 * heads) or heads < 16
                assert (rows + together) * 1024 <= 128 * 1024  # of shared memory
