"""The MLA decode kernels on a Hopper GPU: against float64, on ragged, empty and long batches, inside a graph."""

from __future__ import annotations

import pytest
import torch
from mla_decode_cases import SCALE, Case, cosine_deficit, fresh_generator, random_case, relative_error

pytestmark = pytest.mark.gpu(capability=(9, 0))

SHAPES = [
    ([1], 16, 1),
    ([64, 65, 127, 128, 129], 8, 1),
    ([0, 700, 0, 5], 64, 1),
    ([4, 4096, 63], 16, 4),
    ([17, 0, 3000, 640], 32, 2),
    ([5000, 333], 128, 1),
    ([900, 100], 40, 3),
    ([1000, 77, 8], 128, 8),
    ([100_000, 1, 1000], 16, 1),
    ([0, 1, 64, 100, 700, 2000] * 30, 16, 1),
]


def run(case: Case, kv: str, decode: object = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One decode; what the kernels have to write holds NaN before."""
    from fluentllm.kernels.mla_decode import quantise
    from fluentllm.kernels.mla_decode.decode import MlaDecode

    count, queries, heads, _ = case.q_latent.shape
    if decode is None:
        decode = MlaDecode.create(case.lengths, heads, queries, page_table=case.table)
    assert isinstance(decode, MlaDecode)
    for buffer in (decode.partial, decode.lse):
        buffer.fill_(torch.nan)
    out = torch.full((count, queries, heads, 512), torch.nan, device="cuda", dtype=dtype)
    if kv == "bf16":
        return decode.bf16(case.q_latent, case.q_rope, case.bf16, case.table, SCALE, out)
    content, aligned, scale = quantise.quantise_query(case.q_latent.flatten(0, 1), case.q_rope.flatten(0, 1))
    return decode.fp8(content, aligned, scale, case.planes, case.table, SCALE, out)


@pytest.mark.parametrize(("lengths", "heads", "query_length"), SHAPES)
def test_decode_agrees_with_float64(lengths: list[int], heads: int, query_length: int) -> None:
    case = random_case(lengths, heads, query_length, generator=fresh_generator("cuda"))
    exact, emulated = case.exact(), case.emulated()
    out = run(case, "fp8")
    assert relative_error(out, emulated) < 2e-3
    assert cosine_deficit(out, exact) <= 1.2 * cosine_deficit(emulated, exact) + 1e-9
    assert torch.equal(out, run(case, "fp8")), "a moving result is a race"
    wide = run(case, "bf16")
    assert relative_error(wide, exact) < 3e-3
    assert torch.equal(wide, run(case, "bf16")), "a moving result is a race"


SWITCHES = (
    "PAGES_IN_RECORD",
    "FETCH_MAPS",
    "LAUNCH_EARLY",
    "SWAP_OPERANDS",
    "VALUES_IN_REGISTERS",
    "MERGE_TOGETHER",
)
BY_CLUSTERS, LATENT_FIRST = ("CLUSTERS", "LAUNCH_EARLY"), ("CLUSTERS", "LAUNCH_EARLY", "LATENT_FIRST")
WAYS = [*((name,) for name in SWITCHES), ("SWAP_OPERANDS", "MERGE_TOGETHER"), SWITCHES]


def named(value: object) -> str | None:
    """Switches by their names."""
    return "-".join(value) if isinstance(value, tuple) else None


def turn_on(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from fluentllm.kernels.mla_decode import switches

    for name in (*SWITCHES, "CLUSTERS", "LATENT_FIRST"):
        monkeypatch.setattr(switches, name, name in names)


# Few rows with every switch by itself; other numbers of rows with all of them on: what takes longest is compiling.
FEW_ROWS = [([1], 16, 1), ([100_000, 1, 1000], 16, 1), ([4096] * 32, 16, 1), ([0, 1, 64, 100, 700, 2000] * 30, 16, 1)]
MORE_ROWS = [
    ([1500] * 9, 8, 4),
    ([4, 4096, 63], 16, 4),
    ([17, 0, 3000, 640], 32, 2),
    ([900, 0, 100], 40, 3),
    ([5000, 333], 128, 1),
    ([0, 700, 0, 5, 64, 65] * 30, 128, 1),
    ([1000, 77, 8], 128, 8),
]
CLUSTERED = [
    ([300], 64, 2),
    ([1, 63, 64, 65, 0, 127, 128, 129], 32, 4),
    ([64, 65, 127, 128, 129], 36, 2),
    ([0, 700, 0, 5], 96, 1),
    ([900, 100, 3000, 0], 50, 4),
    ([0, 700, 0, 5, 64, 65] * 30, 128, 1),
    ([100_000, 1, 1000], 64, 2),
    ([1000, 77, 8], 128, 8),
    ([2000] * 50, 32, 4),
]


@pytest.mark.parametrize(
    ("on", "lengths", "heads", "query_length"),
    [(on, *shape) for on in WAYS for shape in FEW_ROWS]
    + [(on, *shape) for on in (SWITCHES, ("VALUES_IN_REGISTERS",)) for shape in MORE_ROWS]
    + [(on, *shape) for on in (BY_CLUSTERS, LATENT_FIRST) for shape in CLUSTERED],
    ids=named,
)
def test_every_switch_agrees_with_float64(
    on: tuple[str, ...], lengths: list[int], heads: int, query_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn_on(on, monkeypatch)
    case = random_case(lengths, heads, query_length, generator=fresh_generator("cuda"))
    exact, emulated = case.exact(), case.emulated()
    for kv, expected, limit in (("fp8", emulated, 2e-3), ("bf16", exact, 3e-3)):
        out = run(case, kv)
        assert relative_error(out, expected) < limit
        assert torch.equal(out, run(case, kv)), "a moving result is a race"
        assert not out[case.lengths == 0].any()


# Rows 1 to 32, of one query and of several; parts with one sequence, with several, and with splits of a long one; none at all.
SWAPPED = [
    ([0], 16, 1),
    ([1], 1, 1),
    ([0, 1, 64, 65, 300, 0], 1, 4),
    ([20_000, 1, 0, 700], 8, 1),
    ([63, 0, 5000, 64, 2], 4, 2),
    ([4, 4096, 63, 0, 129], 4, 4),
    ([1, 0, 3000, 128, 700] * 40, 8, 2),
    ([4096] * 33, 16, 1),
    ([17, 0, 3000, 640, 4], 8, 4),
    ([2, 700, 0, 9000], 16, 2),
    ([1500, 1, 0, 64] * 50, 32, 1),
    ([5, 0, 2000, 191], 7, 3),
]
SETTINGS = ("PAGES_IN_RECORD", "FETCH_MAPS", "LAUNCH_EARLY")


@pytest.mark.parametrize(
    ("on", "dtype"),
    [((), torch.float32), (SETTINGS, torch.bfloat16), ((*SETTINGS, "MERGE_TOGETHER"), torch.float32)],
    ids=["plain", "settings", "merging"],
)
@pytest.mark.parametrize(("lengths", "heads", "query_length"), SWAPPED)
def test_swapped_operands_agree_with_plain_ones(
    lengths: list[int],
    heads: int,
    query_length: int,
    on: tuple[str, ...],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over the BF16 cache, where both round the same probabilities to BF16."""
    case = random_case(lengths, heads, query_length, generator=fresh_generator("cuda"))
    exact = case.exact()
    turn_on(on, monkeypatch)
    plain = run(case, "bf16", dtype=dtype)
    turn_on((*on, "SWAP_OPERANDS"), monkeypatch)
    swapped = run(case, "bf16", dtype=dtype)
    assert torch.equal(swapped, run(case, "bf16", dtype=dtype)), "a moving result is a race"
    assert relative_error(swapped, exact) < (3e-3 if dtype is torch.float32 else 5e-3)
    assert relative_error(swapped, plain) < (1e-3 if dtype is torch.float32 else 3e-3)
    assert not swapped[case.lengths == 0].any()


@pytest.mark.parametrize(("on", "heads"), [*((on, 16) for on in WAYS), (BY_CLUSTERS, 128)], ids=named)
def test_every_switch_in_a_captured_step(on: tuple[str, ...], heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several layers of a step by one plan, behind a kernel that writes their queries and one that appends their keys; lengths
    change between replays. With and without the product that follows."""
    from fluentllm.kernels.mla_decode import quantise
    from fluentllm.kernels.mla_decode.decode import MlaDecode

    turn_on(on, monkeypatch)
    generator = fresh_generator("cuda")
    case = random_case([3000, 500, 0, 900, 64, 2000, 129, 2, 700], heads, 1, generator=generator)
    lengths = case.lengths.clone()
    up_v = (torch.randn(heads, 128, 512, generator=generator, device="cuda") * 0.05).bfloat16()
    shape = case.q_latent.shape
    latent, rope = torch.zeros(9, heads, 512, device="cuda").bfloat16(), torch.zeros(9, heads, 64, device="cuda").bfloat16()
    given = latent.view(shape), rope.view(*shape[:3], 64)
    new_latent, new_rope = (torch.randn(9, n, generator=generator, device="cuda").bfloat16() * 3 for n in (512, 64))
    decode = MlaDecode.create(case.lengths, heads, 1, page_table=case.table)

    def layer() -> list[torch.Tensor]:
        last = case.lengths.long() - 1
        rows = case.table.gather(1, (last.clamp_min(0) // 64)[:, None])[:, 0].long() * 64 + last.clamp_min(0) % 64
        # Inert sequences write to the page of nobody.
        quantise.append(case.planes, new_latent, new_rope, torch.where(last >= 0, rows, 0))
        latent.copy_(case.q_latent.view_as(latent))
        rope.copy_(case.q_rope.view_as(rope))
        content, aligned, scale = quantise.quantise_query(latent, rope)
        fp8 = content.view(shape), aligned.view(*shape[:3], 64), scale.view(shape[:3]), case.planes, case.table, SCALE
        bf16 = *given, case.bf16, case.table, SCALE
        found = [decode.fp8(*fp8, torch.full(shape, torch.nan, device="cuda"))]
        found += [decode.bf16(*bf16, torch.full(shape, torch.nan, device="cuda"))]
        out = torch.full(shape, torch.nan, device="cuda").bfloat16()
        return [*found, decode.fp8(*fp8, out, up_v), decode.bf16(*bf16, out.clone(), up_v)]

    layer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode.refresh()
        layers = [layer() for _ in range(3)]
    for change in ([0] * 9, [-2900, 0, 0, -100, -60, 1, 0, 1, -600], [-1000, -498, 0, -898, -64, 0, 0, 1, 0]):
        case.lengths.copy_(lengths + torch.tensor(change, dtype=torch.int32, device="cuda"))
        latent.fill_(torch.nan)
        graph.replay()
        emulated, exact = case.emulated(), case.exact()
        for fp8, bf16, fp8_values, bf16_values in layers:
            assert relative_error(fp8, emulated) < 2e-3
            assert relative_error(bf16, exact) < 3e-3
            for values, expected in ((fp8_values, emulated), (bf16_values, exact)):
                wanted = torch.einsum("nqhc,hvc->nqhv", expected, up_v.double()).flatten(0, 1)
                assert relative_error(values, wanted) < 8e-3


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("inside", [None, True, False])
@pytest.mark.parametrize(("lengths", "heads", "query_length"), [*SHAPES[:7], ([1024], 16, 1), ([1500] * 8, 16, 1)])
def test_values_of_heads(
    lengths: list[int], heads: int, query_length: int, inside: bool | None, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged, and multiplied with the heads' matrices, whoever merges. Sequences without keys get zeros."""
    from fluentllm.kernels.mla_decode import expand
    from fluentllm.kernels.mla_decode.decode import MlaDecode

    monkeypatch.setattr(expand, "MERGE_INSIDE", inside)
    turn_on(("MERGE_TOGETHER",) * together, monkeypatch)
    generator = fresh_generator("cuda")
    case = random_case(lengths, heads, query_length, generator=generator)
    up_v = (torch.randn(heads, 128, 512, generator=generator, device="cuda") * 0.05).bfloat16()
    expected = torch.einsum("nqhc,hvc->nqhv", case.exact(), up_v.double()).flatten(0, 1)
    decode = MlaDecode.create(case.lengths, heads, query_length)
    found = []
    for _ in range(2):
        for buffer in (decode.partial, decode.lse):
            buffer.fill_(torch.nan)
        latent = torch.full(case.q_latent.shape, torch.nan, dtype=torch.bfloat16, device="cuda")
        found.append(decode.bf16(case.q_latent, case.q_rope, case.bf16, case.table, SCALE, latent, up_v))
    # The kernel's own error, and two roundings to 8 bits: of the latents and of their product.
    assert relative_error(found[0], expected) < 8e-3
    assert torch.equal(*found), "a moving result is a race"
    assert not found[0].view(*case.q_latent.shape[:3], 128)[case.lengths == 0].any()


# Each kernel over the FP8 cache. Heads, and the error that it may have where logits are sharp: FP8 products are added up to
# some 14 bits below the largest addend, which is 1.7e-3 of the output in an emulation, and 6e-3 on top of large rotary parts.
CHOICES: dict[str, dict[str, bool]] = {
    "few rows": {},
    "through registers": {"LATENT_FIRST": False},
    "through registers, latent first": {"LATENT_FIRST": True},
    "many rows": {"CLUSTERS": False, "LATENT_FIRST": False},
    "clusters": {"CLUSTERS": True, "LATENT_FIRST": False},
    "clusters, latent first": {"CLUSTERS": True, "LATENT_FIRST": True},
}
HEADS = {"few rows": 16, "through registers": 32, "through registers, latent first": 32}
SHARP = {"few rows": 2e-3, "through registers, latent first": 2e-3, "clusters, latent first": 2e-3}
KINDS = [(way, HEADS.get(way, 128)) for way in CHOICES]


def choose(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fluentllm.kernels.mla_decode import switches

    for name, value in CHOICES.get(way, {}).items():
        monkeypatch.setattr(switches, name, value)


@pytest.mark.parametrize(("way", "heads"), KINDS)
@pytest.mark.parametrize("deviation", [0.3, 3.0, 8.0])
def test_sharp_logits_and_large_rotary_values(
    deviation: float, way: str, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Against float64 on what was never quantised, and against the same pieces and pages in their order."""
    from fluentllm.kernels.mla_decode import quantise
    from fluentllm.kernels.mla_decode.decode import MlaDecode
    from fluentllm.kernels.mla_decode.replay import combine_reference, decode_pieces

    choose(way, monkeypatch)
    case = random_case([4096, 2000, 300], heads, generator=fresh_generator("cuda"), deviation=deviation, rope=1000.0)
    decode = MlaDecode.create(case.lengths, heads, 1, page_table=case.table)
    out = run(case, "fp8", decode)
    exact, emulated = case.exact(), case.emulated()
    assert cosine_deficit(out, exact) <= 1.2 * cosine_deficit(emulated, exact)
    shape = case.q_latent.shape
    content, aligned, scale = quantise.quantise_query(case.q_latent.flatten(0, 1), case.q_rope.flatten(0, 1))
    queries = content.view(shape), aligned.view(*shape[:3], 64), scale.view(shape[:3])
    replayed, partial, lse = decode_pieces(decode.plan, *queries, case.planes, case.table, SCALE)
    combine_reference(decode.plan, replayed, partial, lse)
    assert relative_error(out, replayed.view(shape)) < (2e-3 if deviation < 1 else SHARP.get(way, 8e-3))


@pytest.mark.parametrize(
    ("kv", "way", "heads"), [*(("fp8", *kind) for kind in KINDS), *(("bf16", "BF16", heads) for heads in (16, 32, 128))]
)
def test_huge_inputs_give_no_nan(kv: str, way: str, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(way, monkeypatch)
    case = random_case([500, 64], heads, generator=fresh_generator("cuda"), latent=1e6, rope=1e30, deviation=1e8)
    assert not run(case, kv).isnan().any()


def test_kernels_quantise_as_the_reference_does() -> None:
    from fluentllm.kernels.mla_decode import fp8_planes, new_fp8_pool, quantise
    from fluentllm.kernels.mla_decode.reference import append_reference, fetch_reference, quantise_reference

    generator = fresh_generator("cuda")
    latent = (torch.randn(300, 512, generator=generator, device="cuda") * 3).bfloat16()
    rope = (torch.randn(300, 64, generator=generator, device="cuda") * 300).bfloat16()
    rows = torch.randperm(640, generator=generator, device="cuda")[:300]
    pools = [new_fp8_pool(10, "cuda") for _ in range(2)]
    quantise.append(fp8_planes(pools[0]), latent, rope, rows)
    append_reference(fp8_planes(pools[1]), latent, rope, rows)
    assert torch.equal(*pools)
    fetched = quantise.fetch(fp8_planes(pools[0]), rows, torch.float32)
    assert torch.equal(fetched, torch.cat(fetch_reference(fp8_planes(pools[1]), rows), 1))
    kernel = quantise.quantise_query(latent.view(75, 4, 512), rope.view(75, 4, 64))
    plain = quantise_reference(latent.view(75, 4, 512), rope.view(75, 4, 64))
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(kernel, plain, strict=True))


def test_a_captured_step_follows_the_lengths_on_the_device() -> None:
    from fluentllm.kernels.mla_decode.decode import MlaDecode

    case = random_case([3000, 500, 900, 64], 16, 2, generator=fresh_generator("cuda"))
    lengths = case.lengths.clone()
    decode = MlaDecode.create(case.lengths, 16, 2)
    out = torch.empty(4, 2, 16, 512, device="cuda")
    latent, up_v = out.bfloat16(), torch.randn(16, 128, 512, device="cuda", dtype=torch.bfloat16)
    given = case.q_latent, case.q_rope, case.bf16, case.table, SCALE
    decode.bf16(*given, out)
    decode.bf16(*given, latent, up_v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode.refresh()
        decode.bf16(*given, out)
        values = decode.bf16(*given, latent, up_v)
    for change in ([0, 0, 0, 0], [-2999, -500, 0, -32], [-100, -300, -800, -64]):
        case.lengths.copy_(lengths + torch.tensor(change, dtype=torch.int32, device="cuda"))
        out.fill_(torch.nan)
        graph.replay()
        exact = case.exact()
        assert relative_error(out, exact) < 3e-3
        assert relative_error(values, torch.einsum("nqhc,hvc->nqhv", exact, up_v.double()).flatten(0, 1)) < 8e-3


def test_the_device_plans_as_the_reference_does() -> None:
    from fluentllm.kernels.mla_decode.plan import new_plan

    for lengths in ([4096] * 32, [0, 0], [1], [100_000, 5, 0, 900], [64] * 500):
        table = torch.randint(1, 1 << 30, (len(lengths), -(-max(lengths) // 64) + 1), dtype=torch.int32)
        host = new_plan(torch.tensor(lengths, dtype=torch.int32), 132, page_table=table)
        device = new_plan(torch.tensor(lengths, dtype=torch.int32, device="cuda"), 132, page_table=table.cuda())
        for name in ("starts", "spans", "records"):
            assert torch.equal(getattr(host, name), getattr(device, name).cpu())
