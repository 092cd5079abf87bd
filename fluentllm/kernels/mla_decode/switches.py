"""Ways of the Hopper decode that can be taken or left, each beside its plain form.

Read at every launch, or when a plan is made. `benchmarks/kernels/mla_decode.py --variants` times each; what was expected of
them, and what came of it, is in benchmarks/kernels/NOTES.md.
"""

PAGES_IN_RECORD = True
"""The plan's record holds the ids of the first pages, so the first of them is asked for one load after the start, not three.
Read when a plan is made, which must be given the page table."""
MERGE_TOGETHER = False
"""The CTAs of a sequence wait for each other at their end and merge its splits, a share each; no combine is launched. They wait
actively, so all of the grid must be on the chip at once: `MlaDecode` sees to it that there are no more CTAs than
multiprocessors. Two such kernels must not run beside each other, as two processes that share a GPU by MPS would let them.

Not "the last to finish merges": one multiprocessor reads four splits of 16 rows (128 KB) from L2 in 2 µs, which is what the
combine takes; together they take a quarter each. And how many splits there are is known on the device alone, so a limit of
eight would leave the combine's launch where it is."""
SWAP_OPERANDS = True
"""Few rows (`decode.MOST_SWAPPED`): keys and columns of the output on the MMA's M, rows on its N (`hopper_swapped`)."""
VALUES_IN_REGISTERS = True
"""FP8 cache, more than 16 rows: V^T is converted on its way to registers, and the reference of the softmax may lag
(`hopper_fp8_many`)."""
CLUSTERS = True
"""FP8 cache, more than 64 rows in an even number of groups of 64: two CTAs share pages, values and probabilities
(`cuda.mla_decode_cluster`). One H200, ctx 4,096: 5 to 10 % less time at 128 and 512 rows."""
LATENT_FIRST = True
"""More than 16 rows: the products of the latent before those of the rotary part. The sums of FP8 products are kept to some 14
bits below the largest addend, so what large rotary parts have put there costs the latent's accuracy: an emulation is 2e-3 to
6e-3 off where logits have a standard deviation of 3 or 8, and 0.5e-3 to 1.7e-3 in this order. One H200, ctx 4,096: up to 1 %
more time, 3 % at 128 heads × 4 × 128."""
LAUNCH_EARLY = True
"""Programmatic dependent launch of the decode: barriers and partitions are set up while the kernel in front ends."""
FETCH_MAPS = True
"""Each tensor map is used once, on a place outside its tensor, before anything is known: it is there when the first page's
number is."""
