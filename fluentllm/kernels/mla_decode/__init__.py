"""MLA decode over a paged cache of BF16 values or of FP8 tokens (644 bytes): references, plan, quantisation, Hopper kernels.

    pool = new_fp8_pool(pages, device)                       # one layer
    planes = fp8_planes(pool)
    quantise.append(planes, latent, rope, rows)              # what this step writes
    decode = MlaDecode.create(lengths, heads, query_length)  # once a shape; `refresh` once a step
    decode.fp8(*quantise.quantise_query(q_latent, q_rope), planes, page_table, scale, out)

`layout` describes the cache, `reference` is all of it in plain torch. `decode` needs Triton and an sm_90 GPU.
"""

from .layout import PAGE_BYTES, TOKEN_BYTES, Fp8Planes, fp8_planes, new_fp8_pool

__all__ = ["PAGE_BYTES", "TOKEN_BYTES", "Fp8Planes", "fp8_planes", "new_fp8_pool"]
