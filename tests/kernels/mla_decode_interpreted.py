"""Run by `test_mla_decode_triton` with TRITON_INTERPRET=1: this package's plain Triton kernels against their references."""

from __future__ import annotations

import torch
import triton
from mla_decode_cases import SCALE, fresh_generator, random_case, relative_error

from fluentllm.kernels.mla_decode import fp8_planes, new_fp8_pool, plan, quantise
from fluentllm.kernels.mla_decode.append import append_norms
from fluentllm.kernels.mla_decode.combine import combine_splits
from fluentllm.kernels.mla_decode.reference import append_reference, fetch_reference, quantise_reference
from fluentllm.kernels.mla_decode.replay import combine_reference, decode_pieces
from fluentllm.kernels.plain import PlainOps

torch.set_num_threads(1)
generator = fresh_generator()


def check_plan(slack: int) -> None:
    plan.SLACK = slack
    for lengths, parts in (([5, 64, 0, 1000], 5), ([0, 0], 3), ([4096] * 4, 9), ([100, 0, 7000, 30], 7), ([64] * 20, 6)):
        table = torch.randint(1, 10_000, (len(lengths), 120), generator=generator, dtype=torch.int32)
        for given, cells in ((None, 0), (table, 6)):
            expected = plan.new_plan(torch.tensor(lengths, dtype=torch.int32), parts, page_table=given, cells=cells)
            starts, spans, records = (torch.full_like(x, 9) for x in (expected.starts, expected.spans, expected.records))
            counters = torch.full((len(lengths) * cells + 7,), 5, dtype=torch.int32) if cells else None
            plan.plan_kernel[(parts,)](
                expected.lengths, starts, spans, records, given, counters, len(lengths), 120, CELLS=cells, PARTS=parts,
                OVERHEAD=plan.OVERHEAD, SLACK=slack, PAGE=64, STEPS=plan.SEARCH_STEPS, RECORD=plan.RECORD,
                PAGES_AT=plan.PAGES_AT, BLOCK=triton.next_power_of_2(len(lengths)),
            )  # fmt: skip
            assert torch.equal(starts, expected.starts)
            assert torch.equal(spans, expected.spans)
            assert torch.equal(records, expected.records)
            if counters is not None:
                assert not counters[:-7].any()
                assert (counters[-7:] == 5).all()


def check_quantisation() -> None:
    latent = (torch.randn(20, 512, generator=generator) * 3).bfloat16()
    rope = (torch.randn(20, 64, generator=generator) * 300).bfloat16()
    rows = torch.randperm(192, generator=generator)[:20]
    pools = [new_fp8_pool(3, "cpu") for _ in range(2)]
    quantise.append(fp8_planes(pools[0]), latent, rope, rows)
    append_reference(fp8_planes(pools[1]), latent, rope, rows)
    kernel, plain = fp8_planes(pools[0]), fp8_planes(pools[1])
    assert torch.equal(kernel.scale, plain.scale)
    assert torch.equal(kernel.rope, plain.rope)
    # The interpreter's E4M3 cast loses the carry of a mantissa that rounds up to the next power of two, and rounds some others
    # by a step; on a GPU the bytes are equal (test_mla_decode_gpu).
    assert ((kernel.latent.float() - plain.latent.float()).abs() <= plain.latent.float().abs() / 2 + 2**-9).all()
    assert (kernel.latent.float() != plain.latent.float()).float().mean() < 0.15
    assert torch.equal(quantise.fetch(plain, rows, torch.float32), torch.cat(fetch_reference(plain, rows), 1))


def rotary_rows(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of no particular angles: cosines and sines need not belong together."""
    cos, sin = torch.randn(2, tokens, 1, 64, generator=generator)
    return cos, sin


def check_append_norms() -> None:
    """Against norms, rotary and `append_reference` one after the other; rows in a pool of several layers."""
    ops = PlainOps()
    for tokens, q_size, latent_scale, interleaved in ((7, 48, 1.0, True), (5, 0, 2.5, False), (0, 16, 1.0, True)):
        kv = (torch.randn(tokens, q_size + 576, generator=generator) * 3)[:, q_size:]
        kv_weight = torch.rand(512, generator=generator) + 0.5
        rotary = rotary_rows(tokens)
        rows = torch.randperm(192, generator=generator)[:tokens]
        pools = [torch.zeros(2, 3, 64, 644, dtype=torch.uint8) for _ in range(2)]
        planes, expected = (fp8_planes(pool[1]) for pool in pools)
        plain, plain_rows = torch.zeros(20, 576), torch.randperm(20, generator=generator)[:tokens]
        append_norms(
            kv, kv_weight, *rotary, rows, planes, eps=1e-6, latent_scale=latent_scale, interleaved=interleaved, plain=plain,
            plain_rows=plain_rows,
        )  # fmt: skip
        latent = ops.rms_norm(kv[:, :512], kv_weight, 1e-6) * latent_scale
        turned = ops.rotary(kv[:, None, 512:], *rotary, interleaved=interleaved)[:, 0]
        wanted = torch.zeros_like(plain).index_copy_(0, plain_rows, torch.cat((latent, turned), 1))
        torch.testing.assert_close(plain, wanted)
        # From here on what the kernel itself rounded: a value at the edge of two E4M3 steps may fall to either side.
        append_reference(expected, plain[plain_rows, :512], plain[plain_rows, 512:], rows)
        assert torch.equal(planes.scale, expected.scale)
        assert relative_error(planes.rope, expected.rope) < 5e-3
        assert (planes.latent.float() != expected.latent.float()).float().mean() < 0.15
        assert pools[0][0].count_nonzero() == 0
        written = quantise.fetch(planes, rows, torch.float32, out=torch.zeros(20, 576), out_rows=plain_rows)
        assert relative_error(written[plain_rows], torch.cat(fetch_reference(planes, rows), 1)) == 0 or not tokens
        assert written.count_nonzero(1).count_nonzero() == tokens


def check_query() -> None:
    q_latent, q_rope = torch.randn(6, 4, 512, generator=generator), torch.randn(6, 4, 64, generator=generator)
    for interleaved in (True, False):
        rotary = rotary_rows(6)
        turned = PlainOps().rotary(q_rope, *rotary, interleaved=interleaved)
        _, aligned, scale = quantise.quantise_query(q_latent, q_rope, rotary=rotary, interleaved=interleaved)
        _, expected, expected_scale = quantise_reference(q_latent, turned)
        assert torch.equal(scale, expected_scale)
        assert relative_error(aligned, expected) < 5e-3  # the interpreter truncates to BF16


def check_combine() -> None:
    case = random_case([900, 0, 64, 300], 2, 2, generator=generator)
    content, aligned, scale = quantise_reference(case.q_latent, case.q_rope)
    split = plan.new_plan(case.lengths, 6)
    out, partial, lse = decode_pieces(split, content, aligned, scale, case.planes, case.table, SCALE)
    expected = out.clone()
    combine_reference(split, expected, partial, lse)
    for columns, splits, each in ((64, 64, 1), (512, 2, 1), (512, 2, 2), (512, 8, 4)):
        merged = out.clone()
        combine_splits[(4 // each, 512 // columns, 4)](
            merged, partial, lse, split.spans, ROWS=4, EACH=each, COLUMNS=columns, SPLITS=splits, MOST=1, PDL=0
        )
        assert relative_error(merged, expected) < 1e-6
    assert relative_error(expected.view(4, 2, 2, 512), case.emulated()) < 2e-3


if __name__ == "__main__":
    check_plan(0)
    check_plan(2)
    check_quantisation()
    check_append_norms()
    check_query()
    check_combine()
