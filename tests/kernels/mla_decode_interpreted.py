"""Run by `test_mla_decode_triton` with TRITON_INTERPRET=1: this package's plain Triton kernels against their references."""

from __future__ import annotations

import torch
import triton
from mla_decode_cases import SCALE, fresh_generator, random_case, relative_error

from fluentllm.kernels.mla_decode import fp8_planes, new_fp8_pool, plan, quantise
from fluentllm.kernels.mla_decode.combine import combine_splits
from fluentllm.kernels.mla_decode.reference import append_reference, fetch_reference, quantise_reference
from fluentllm.kernels.mla_decode.replay import combine_reference, decode_pieces

torch.set_num_threads(1)
generator = fresh_generator()


def check_plan() -> None:
    for lengths, parts in (([5, 64, 0, 1000], 5), ([0, 0], 3), ([4096] * 4, 9), ([100, 0, 7000, 30], 7), ([64] * 20, 6)):
        expected = plan.new_plan(torch.tensor(lengths, dtype=torch.int32), parts)
        starts, spans, records = (torch.zeros_like(x) for x in (expected.starts, expected.spans, expected.records))
        plan.plan_kernel[(parts,)](
            expected.lengths, starts, spans, records, len(lengths), PARTS=parts, OVERHEAD=plan.OVERHEAD, PAGE=64,
            STEPS=plan.SEARCH_STEPS, BLOCK=triton.next_power_of_2(len(lengths)),
        )  # fmt: skip
        assert torch.equal(starts, expected.starts)
        assert torch.equal(spans, expected.spans)
        assert torch.equal(records, expected.records)


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


def check_query() -> None:
    q_latent, q_rope = torch.randn(6, 4, 512, generator=generator), torch.randn(6, 4, 64, generator=generator)
    angles = torch.rand(9, 32, generator=generator) * 6
    table, positions = torch.cat([angles.cos(), angles.sin()], 1), torch.randint(0, 9, (6,), generator=generator)
    cos, sin = angles.cos()[positions][:, None], angles.sin()[positions][:, None]
    for interleaved in (True, False):
        a, b = (q_rope[..., ::2], q_rope[..., 1::2]) if interleaved else (q_rope[..., :32], q_rope[..., 32:])
        pair = torch.stack([a * cos - b * sin, b * cos + a * sin], -1 if interleaved else -2).flatten(-2)
        _, aligned, scale = quantise.quantise_query(
            q_latent, q_rope, cos_sin=table, positions=positions, interleaved=interleaved
        )
        _, expected, expected_scale = quantise_reference(q_latent, pair)
        assert torch.equal(scale, expected_scale)
        assert relative_error(aligned, expected) < 5e-3  # the interpreter truncates to BF16


def check_combine() -> None:
    case = random_case([900, 0, 64, 300], 2, 2, generator=generator)
    content, aligned, scale = quantise_reference(case.q_latent, case.q_rope)
    split = plan.new_plan(case.lengths, 6)
    out, partial, lse = decode_pieces(split, content, aligned, scale, case.planes, case.table, SCALE)
    expected = out.clone()
    combine_reference(split, expected, partial, lse)
    for columns, splits in ((64, 64), (512, 2)):
        merged = out.clone()
        combine_splits[(4, 512 // columns, 4)](
            merged, partial, lse, split.spans, ROWS=4, COLUMNS=columns, SPLITS=splits, PDL=False
        )
        assert relative_error(merged, expected) < 1e-6
    assert relative_error(expected.view(4, 2, 2, 512), case.emulated()) < 2e-3


if __name__ == "__main__":
    check_plan()
    check_quantisation()
    check_query()
    check_combine()
